"""How far some work is, as a bar with words."""

from __future__ import annotations

from trimtab.ui.page.plain_text import plain


def progress_bar(told: str, *, done: int, total: int) -> str:
    """Return the bar; one that only says that something is under way where the total is unknown.

    Args:
        told: the words and numbers beside it.
        done: steps done.
        total: steps in all, 0 while nobody knows.
    """
    share = f' value="{done:d}" max="{total:d}"' if total else ""
    return (
        f'<div class="tt-progress"><progress aria-label="{plain(told)}"{share}></progress>'
        f"<span>{plain(told)}</span></div>"
    )

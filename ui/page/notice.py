"""Sentences above the fold: what went wrong and what to do, or what was done."""

from __future__ import annotations

from trimtab.ui.page.plain_text import plain


def problem(error: Exception | str) -> str:
    """Return the box of an error, its sentence for people; screen readers speak it at once."""
    return f'<div class="tt-notice tt-problem" role="alert">{plain(str(error))}</div>'


def done(sentence: str) -> str:
    """Return the box of something that worked."""
    return f'<div class="tt-notice tt-done" role="status">{plain(sentence)}</div>'


def note(sentence: str) -> str:
    """Return the box of something to know: what is under way, or what is not there yet."""
    return f'<div class="tt-notice" role="status">{plain(sentence)}</div>'

"""A table whose cells are coloured by their numbers: blue for one way, orange for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.ui.page.plain_text import plain


@dataclass(frozen=True)
class Cell:
    """One cell. The colour repeats what its text says.

    Attributes:
        text: what stands in it.
        share: -1 to 1: blue above zero, orange below, none at zero.
        title: the whole of it, for whoever points at it.
        is_marked: drawn with an outline and a sign.
    """

    text: str
    share: float = 0.0
    title: str = ""
    is_marked: bool = False


def heat_table(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
) -> str:
    """Return the table, in a box that scrolls by itself where it is too wide.

    Args:
        caption: what the numbers are.
        corner: what the rows' headings are.
        columns: the columns' headings.
        rows: a heading and its cells each.
    """
    head = "".join(f'<th scope="col">{plain(name)}</th>' for name in (corner, *columns))
    body = "".join(
        f'<tr><th scope="row" title="{plain(name)}">{plain(name)}</th>'
        f"{''.join(map(_cell, cells))}</tr>"
        for name, cells in rows
    )
    # A box that scrolls has to be reached by keyboard, and then it needs a name. The caption is
    # outside of it, so that it never scrolls out of sight.
    return (
        f'<div><p class="tt-hint" aria-hidden="true">{plain(caption)}</p>'
        f'<div class="tt-grid-box" tabindex="0" role="region" aria-label="{plain(corner)}">'
        f'<table class="tt-grid" aria-label="{plain(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _cell(cell: Cell) -> str:
    share = max(-1.0, min(1.0, cell.share))
    colour = "--tt-heat-for" if share > 0 else "--tt-heat-against"
    style = f"background:color-mix(in srgb, var({colour}) {round(abs(share) * 100)}%, transparent)"
    title = f' title="{plain(cell.title)}"' if cell.title else ""
    mark = ' class="tt-knee"' if cell.is_marked else ""
    sign = '<b aria-label="chosen">◆</b>' if cell.is_marked else ""
    return f'<td style="{style}"{title}{mark}>{sign}{plain(cell.text)}</td>'

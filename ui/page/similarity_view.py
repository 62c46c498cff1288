"""How alike the stored vectors are: the table of cosines, and one vector's neighbours in words."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.heat_table import Cell, heat_table
from trimtab.ui.page.library_list import text

MOST = 24  # vectors side by side: more cannot be read, and a page of them is slow
_NEIGHBOURS = 4
_ALIKE = 0.1


def similarity_html(answer: dict[str, Any], chosen: str | None) -> str:
    """Return the neighbours of the chosen vector in words, and the table.

    Of more than `MOST` vectors, those are in the table that point most like the chosen one, or
    most against it; without a choice the first ones.

    Args:
        answer: of GET /v1/steering/similarities.
        chosen: the id of one of its vectors.
    """
    ids, matrix = answer["ids"], answer["matrix"]
    if len(ids) < 2:
        return '<p class="tt-hint">There is nothing to compare with one vector alone.</p>'
    at = ids.index(chosen) if chosen in ids else None
    shown = list(range(len(ids)))
    if len(ids) > MOST:
        if at is not None:
            shown.sort(key=lambda i: (i != at, -abs(matrix[at][i] or 0.0)))
        shown = sorted(shown[:MOST])
    rows = [
        (ids[i], [_cell(ids[i], ids[j], matrix[i][j], is_same=i == j) for j in shown])
        for i in shown
    ]
    where = (
        "at each vector's own layers" if answer["layer"] is None else f"at layer {answer['layer']}"
    )
    caption = f"Cosine similarity {where}: +1 the same way, 0 unrelated, −1 opposite."
    if len(shown) < len(ids):
        caption += f" {len(shown)} of {len(ids)} vectors."
    words = "" if at is None else neighbours_html(ids[at], dict(zip(ids, matrix[at], strict=True)))
    return words + heat_table(caption, "vector", [ids[j] for j in shown], rows)


def neighbours_html(vector: str, cosines: dict[str, float | None]) -> str:
    """Return a vector's nearest neighbours in words.

    Args:
        vector: its id.
        cosines: with every vector, itself among them; None where there is nothing to compare.
    """
    known = {name: value for name, value in cosines.items() if name != vector and value is not None}
    alone = [name for name, value in cosines.items() if value is None]
    near = sorted((n for n in known if known[n] >= _ALIKE), key=lambda n: -known[n])
    against = sorted((n for n in known if known[n] <= -_ALIKE), key=lambda n: known[n])
    parts = []
    if near:
        parts.append(f"nearest to {_names(near, known)}")
    if against:
        parts.append(f"most against {_names(against, known)}")
    if known and not parts:
        parts.append("nearly unrelated to every other vector")
    if alone:
        parts.append(f"not comparable with {len(alone)} (no layer or model in common)")
    said = "; ".join(parts) or "there is nothing to compare it with"
    return f'<p class="tt-neighbours"><b>{text(vector)}</b>: {said}.</p>'


def signed(value: float) -> str:
    """Return a cosine with its sign, two decimals; a true minus."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _names(names: list[str], cosines: dict[str, float]) -> str:
    return ", ".join(f"{text(name)} ({signed(cosines[name])})" for name in names[:_NEIGHBOURS])


def _cell(one: str, other: str, value: float | None, *, is_same: bool) -> Cell:
    if value is None:
        return Cell("none", 0.0, f"{one} and {other} have no layer or model in common")
    if is_same:
        return Cell("+1", 0.0, f"{one} with itself")
    return Cell(signed(value), value, f"{one} and {other}: {value:+.4f}")

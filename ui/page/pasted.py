"""Examples that somebody pasted or uploaded: JSON lines or simple columns, with their line numbers.

What is at fault is found here and told by its line, before anything is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.steering.errors import DataError
from trimtab.training.vectors.pairs import pair_set

MAX_CHARS = 2**20
"""Characters that a field of the page takes; more goes through the command line."""

_COLUMNS = re.compile(r"\t+|\s*\|\|\s*")
_PLACE = re.compile(r"\b(?:pairs|texts)\[(\d+)\](?:\.(\w+))?")


@dataclass(frozen=True)
class Pasted:
    """Rows as the server takes them.

    Attributes:
        rows: an object each.
        lines: the line of each, from 1.
    """

    rows: list[dict[str, Any]]
    lines: list[int]

    def in_lines(self, sentence: str) -> str:
        """Return a server's sentence with lines in place of its JSON paths."""

        def line(found: re.Match[str]) -> str:
            i = int(found[1])
            if i >= len(self.lines):
                return found[0]
            return f"line {self.lines[i]}" + (f", {found[2]!r}," if found[2] else "")

        return _PLACE.sub(line, sentence)


def pasted_pairs(text: str) -> Pasted:
    """Return pairs from pasted text.

    A line is JSON as in the command line's files, or columns with tabs or `||` between them:
    preferred and dispreferred text, or a prompt before them.

    Raises:
        DataError: a line is at fault (named), or there are too few.
    """
    pasted = _pasted(text, _pair_of, "preferred || dispreferred")
    pair_set(_places(pasted), name="What is pasted")
    return pasted


def pasted_texts(text: str) -> Pasted:
    """Return labelled texts from pasted text.

    A line is JSON as in the command line's files, or a label and a text with a tab or `||` between.

    Raises:
        DataError: a line is at fault (named), or there are too few.
    """
    # Here and not above: it brings libraries that the page's start can do without.
    from trimtab.training.classifiers.readers import labelled_texts

    pasted = _pasted(text, _labelled_of, "label || text")
    labelled_texts(_places(pasted), name="What is pasted")
    return pasted


def _pasted(
    text: str, of_columns: Callable[[Sequence[str]], dict[str, Any] | None], form: str
) -> Pasted:
    if len(text) > MAX_CHARS:
        raise DataError(
            f"What is pasted has {len(text)} characters, over the page's {MAX_CHARS}. Build it "
            "with the command line."
        )
    rows, lines = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            row = _json(line, number)
        else:
            found = of_columns([part.strip() for part in _COLUMNS.split(line.strip())])
            if found is None:
                raise DataError(
                    f"Line {number} is neither JSON nor `{form}` (a tab does as well): "
                    f"{line.strip()[:60]!r}."
                )
            row = found
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(f"Nothing is pasted. Give a line each: `{form}`, or JSON lines.")
    return Pasted(rows, lines)


def _json(line: str, number: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)  # it starts with a brace
    # Thousands of nested brackets end in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise DataError(f"Line {number} is not valid JSON: {error}.") from None
    return row


def _pair_of(columns: Sequence[str]) -> dict[str, Any] | None:
    names: dict[int, tuple[str, ...]] = {
        2: ("positive", "negative"),
        3: ("prompt", "preferred", "dispreferred"),
    }
    found = names.get(len(columns))
    return dict(zip(found, columns, strict=True)) if found else None


def _labelled_of(columns: Sequence[str]) -> dict[str, Any] | None:
    return dict(zip(("label", "text"), columns, strict=True)) if len(columns) == 2 else None


def _places(pasted: Pasted) -> list[tuple[str, Any]]:
    return [(f"Line {n}", row) for n, row in zip(pasted.lines, pasted.rows, strict=True)]

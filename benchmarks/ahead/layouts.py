"""Whether inline PTX that works on packs of elements is given neighbours.

Triton packs the elements of a thread as they come in its registers. Texts that decode a word of
several codes are right only if these are neighbouring columns, which depends on the layout that
Triton chose, and nothing else would tell.
"""

from __future__ import annotations

import re

_ALIAS = re.compile(r"^(#\w+) = (.*)$", re.M)
_CALL = re.compile(
    r"elementwise_inline_asm .*?packed_element = (\d+) : i32.*?\} .*? : tensor<(\w+), (.*)$", re.M
)
_RANK_2 = re.compile(r"\d+x\d+x[a-zA-Z]\w*")


def too_few_neighbours(ttgir: str) -> list[str]:
    """Return what is wrong with a kernel's calls of inline PTX on matrices, in words."""
    aliases = dict(_ALIAS.findall(ttgir))
    found = []
    for pack, shape, rest in _CALL.findall(ttgir):
        if not _RANK_2.fullmatch(shape):  # texts for scales work on each element alone
            continue
        layout = rest
        if name := re.match(r"(#\w+)>", rest):
            layout = aliases[name[1]]
        if neighbours(layout) % int(pack):
            found.append(
                f"packs of {pack} where a thread has {neighbours(layout)} neighbours: {layout[:80]}"
            )
    return found


def neighbours(layout: str) -> int:
    """Return how many columns in a row a thread's first registers hold, 1 if that is unknown."""
    if layout.startswith("#ttg.dot_op") and (width := re.search(r"kWidth = (\d+)", layout)):
        return int(width[1])
    if found := re.search(
        r"#ttg\.blocked<\{sizePerThread = \[\d+, (\d+)\].*order = \[1, 0\]", layout
    ):
        return int(found[1])
    if found := re.search(r"#ttg\.linear<\{register = \[(.*?)\], lane", layout):
        count = 1
        for row, column in re.findall(r"\[(\d+), (\d+)\]", found[1]):
            if (int(row), int(column)) != (0, count):
                break
            count *= 2
        return count
    return 1

"""Which kernel, tile and split a product gets. The numbers are in `dispatch.json`, in one place.

They have not been measured on hardware yet (`measured_on` is null): tiles are those with the fewest
instructions a weight in the compiled code, crossovers come from the memory floors of an H200.
`benchmarks/gpu/run.py --sections matmul` measures them and writes a file of the same form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.kernels.matmul.fragments import COLUMNS, ROWS

FILE = Path(__file__).with_name("dispatch.json")
DECODING = 64
"""Up to so many tokens a step of decoding, and a token's result does not depend on the others."""


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with what.

    Attributes:
        up_to: number of tokens for which it is the best; None for all more.
        tokens: of a program.
        rows: of the weight, of a program; a multiple of 64.
        warps: 4 for each 64 rows multiplied at once.
        stages: blocks of 256 columns under way from memory.
    """

    up_to: int | None
    tokens: int
    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Table:
    """A scheme's tiles in the order of tokens, and from how many tokens a matrix is expanded."""

    tiles: tuple[Tile, ...]
    expand_from: int

    def tile(self, n_tokens: int) -> Tile:
        """Return the tile for a number of tokens."""
        fits = (tile for tile in self.tiles if tile.up_to is None or n_tokens <= tile.up_to)
        return next(fits)


@dataclass(frozen=True)
class Dispatch:
    """What was measured, or is assumed.

    Attributes:
        measured_on: the GPU, or None.
        programs: how many there should be at least, two for each of an H200's multiprocessors.
        least_blocks: of 256 columns, that a split leaves a program.
        fp8, half, int4: the tables.
    """

    measured_on: str | None
    programs: int
    least_blocks: int
    fp8: Table
    half: Table
    int4: Table

    def table(self, scheme: str) -> Table:
        """Return a scheme's table."""
        if scheme == "fp8":
            return self.fp8
        return self.int4 if scheme.startswith("int4") else self.half

    def splits(self, n_out: int, n_in: int, *, n_tokens: int) -> int:
        """Return into how many programs a row's columns are split, a power of two.

        For a step of decoding it depends on the matrix alone: a token's sums have the same order
        whoever else is in the batch. With more tokens there are programs enough.
        """
        if n_tokens > DECODING:
            return 1
        n_programs, blocks, splits = -(-n_out // ROWS), -(-n_in // COLUMNS), 1
        while n_programs * splits < self.programs and blocks // (2 * splits) >= self.least_blocks:
            splits *= 2
        return splits


def parse(content: dict[str, Any]) -> Dispatch:
    """Return the dispatch of a file's content.

    Raises:
        TypeError: an unknown or missing field.
        ValueError: tiles that leave some number of tokens out.
    """
    tables = {}
    for name in ("fp8", "half", "int4"):
        table = dict(content[name])
        tiles = tuple(Tile(**tile) for tile in table.pop("tiles"))
        bounds = [tile.up_to or 0 for tile in tiles]
        if bounds[-1:] != [0] or 0 in bounds[:-1] or bounds[:-1] != sorted(bounds[:-1]):
            raise ValueError(f"{name}: tiles up to {bounds}; expected rising bounds and null last")
        tables[name] = Table(tiles=tiles, **table)
    return Dispatch(**{**content, **tables})


@cache
def dispatch() -> Dispatch:
    """Return what `dispatch.json` says."""
    return parse(json.loads(FILE.read_text()))

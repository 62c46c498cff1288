"""How much of a matrix is worked on at once."""

from __future__ import annotations

from collections.abc import Iterator

# Values: 32 MiB in float32, so that a matrix of an 8B model takes little memory beside itself.
CHUNK = 1 << 23


def row_chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Yield slices of rows that together hold about 8 million values each, at least one row."""
    step = max(1, CHUNK // max(1, n_columns))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))

"""The values a quantised matrix can take: sixteen for each group of each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from trimtab.kernels.formats.codebook import Codebook
from trimtab.kernels.formats.parts import Parts
from trimtab.kernels.formats.rows import row_chunks

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Grid:
    """Affine levels of each group: value = step * (level[code] - zero).

    Attributes:
        format: the format's name.
        group_size: columns that share a step.
        shape: of the matrix, `(n_out, n_in)`.
        codebook: the levels.
        parts: the scales as they are stored.
    """

    format: str
    group_size: int
    shape: tuple[int, int]
    codebook: Codebook
    parts: Parts

    @cached_property
    def step(self) -> torch.Tensor:
        """What one unit is worth, `[n_out, n_groups]`, float32."""
        return self.parts.steps()

    @cached_property
    def zero(self) -> torch.Tensor | None:
        """Level that means 0, `[n_out, n_groups]`, float32; None where it is the codebook's own."""
        return None if self.parts.zeros is None else self.parts.zeros.float()

    def encode(
        self,
        values: torch.Tensor,
        *,
        columns: slice = _ALL,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Round values to the grid.

        Args:
            values: `[n_out, n_columns]`, any floating dtype, finite.
            columns: which columns of the matrix they are, all by default, in steps of 1.
            rounding: `nearest`, ties to the even code, or `stochastic`, unbiased inside the range.
            generator: for stochastic rounding; None means torch's own.

        Returns:
            Codes 0..15, `[n_out, n_columns]`, uint8.

        Raises:
            ValueError: values that are not these columns, or an unknown rounding.
        """
        group_of = self._groups_of(columns, values.shape)
        if rounding not in ROUNDINGS:
            raise ValueError(f"{rounding!r} is no rounding; allowed: {', '.join(ROUNDINGS)}")
        codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        for rows in row_chunks(*values.shape):
            units = self._units(values[rows].float(), rows, group_of)
            if rounding == "nearest":
                codes[rows] = self.codebook.nearest(units)
            else:
                codes[rows] = self.codebook.stochastic(units, generator=generator)
        return codes

    def decode(
        self, codes: torch.Tensor, *, columns: slice = _ALL, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return what codes stand for.

        Args:
            codes: 0..15, `[n_out, n_columns]`, uint8.
            columns: which columns of the matrix they are, all by default, in steps of 1.
            dtype: of the result; the arithmetic is float32.

        Returns:
            `[n_out, n_columns]`.

        Raises:
            ValueError: codes that are not these columns.
        """
        group_of = self._groups_of(columns, codes.shape)
        values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in row_chunks(*codes.shape):
            levels = self.codebook.decode(codes[rows])
            values[rows] = self._values(levels, rows, group_of)
        return values

    def _units(
        self, values: torch.Tensor, rows: slice, group_of: torch.Tensor | None
    ) -> torch.Tensor:
        """Return values `[rows, columns]`, float32, in units of their step, zero point added."""
        step, zero = self._spread(rows, group_of)
        # A file may have a step of 0 for a group of zeros; 0 / 0 is none.
        units = _grouped(values, step) / torch.where(step > 0, step, torch.inf)
        # Adding 0.0 where there is no zero point would be a pass for nothing, and make -0 a 0.
        if isinstance(zero, torch.Tensor) or zero:
            units = units + zero
        return units.reshape(values.shape)

    def _values(
        self, levels: torch.Tensor, rows: slice, group_of: torch.Tensor | None
    ) -> torch.Tensor:
        step, zero = self._spread(rows, group_of)
        grouped = _grouped(levels, step)
        if isinstance(zero, torch.Tensor) or zero:
            grouped = grouped - zero
        return (grouped * step).reshape(levels.shape)

    def _spread(
        self, rows: slice, group_of: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return step and zero shaped to broadcast: `[r, n_groups, 1]`, or `[r, n_columns]`."""
        step = self.step[rows]
        zero = None if self.zero is None else self.zero[rows]
        if group_of is None:
            step = step.unsqueeze(-1)
            zero = None if zero is None else zero.unsqueeze(-1)
        else:
            step = step[:, group_of]
            zero = None if zero is None else zero[:, group_of]
        return step, self.codebook.zero if zero is None else zero

    def _groups_of(self, columns: slice, shape: torch.Size) -> torch.Tensor | None:
        """Return the group of each column `[n_columns]`, int64; None for the whole matrix."""
        start, stop, stride = columns.indices(self.shape[1])
        if stride != 1 or tuple(shape) != (self.shape[0], max(0, stop - start)):
            raise ValueError(
                f"{tuple(shape)} is not columns {start} to {stop} of a {self.shape} matrix"
            )
        if stop - start == self.shape[1]:
            return None
        return torch.arange(start, stop, device=self.parts.scales.device) // self.group_size


def _grouped(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """View `[rows, columns]` as `[rows, n_groups, group]` where `step` is `[rows, n_groups, 1]`."""
    return values.view(*step.shape[:2], -1) if step.ndim == 3 else values

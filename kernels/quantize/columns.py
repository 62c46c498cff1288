"""A grid read column by column in any order: what error feedback does thousands of times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trimtab.kernels.formats import Grid


class Columns:
    """The columns of a grid, laid out so that each is one contiguous row.

    Args:
        grid: the levels.
        order: which column of the matrix comes when, `[n_in]`, int64.
        served: what codes 0 to 7 are multiplied as, `[n_out, n_groups, 8]`, float32, where that is
            not quite what they stand for (FP4 as FP8); codes 8 to 15 are their negatives. Values
            are rounded by the grid and come out as served, so that whoever makes up for errors sees
            all.
    """

    def __init__(
        self, grid: Grid, order: torch.Tensor, *, served: torch.Tensor | None = None
    ) -> None:
        group_of = order // grid.group_size
        self._rounded = grid.codebook.rounded
        step = grid.step[:, group_of].T.contiguous()
        # A step of 0 belongs to a group of zeros: everything in it is 0, and 0 / 0 is no number.
        self._step = step
        self._per_unit = torch.where(step > 0, 1 / step, 0.0)
        zero = grid.codebook.zero if grid.zero is None else grid.zero[:, group_of].T.contiguous()
        self._zero = zero
        self._nearest = grid.codebook.nearest
        # Signed and transposed: [n_groups, n_out, 16], one row a group of columns.
        self._served = None if served is None else torch.cat([served, -served], -1).transpose(0, 1)
        self._group_of = group_of.tolist()
        self._grid, self._order = grid, order

    def nearest(self, i: int, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the i-th column in order, `[n_out]`, rounded to the grid."""
        if self._served is not None:
            codes = self._nearest(values * self._per_unit[i]).long()
            return self._served[self._group_of[i]].gather(1, codes.unsqueeze(1))[:, 0]
        zero = self._zero[i] if isinstance(self._zero, torch.Tensor) else self._zero
        return (self._rounded(values * self._per_unit[i] + zero) - zero) * self._step[i]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what codes `[n_out, n_in]` are, `[n_in, n_out]`, columns in order."""
        if self._served is None:
            return self._grid.decode(codes).T[self._order]
        ordered = codes.T[self._order].long()
        rows = [
            self._served[group].gather(1, column.unsqueeze(1))[:, 0]
            for group, column in zip(self._group_of, ordered, strict=True)
        ]
        return torch.stack(rows)

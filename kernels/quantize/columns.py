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
    """

    def __init__(self, grid: Grid, order: torch.Tensor) -> None:
        group_of = order // grid.group_size
        self._rounded = grid.codebook.rounded
        step = grid.step[:, group_of].T.contiguous()
        # A step of 0 belongs to a group of zeros: everything in it is 0, and 0 / 0 is no number.
        self._step = step
        self._per_unit = torch.where(step > 0, 1 / step, 0.0)
        zero = grid.codebook.zero if grid.zero is None else grid.zero[:, group_of].T.contiguous()
        self._zero = zero

    def nearest(self, i: int, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the i-th column in order, `[n_out]`, rounded to the grid."""
        zero = self._zero[i] if isinstance(self._zero, torch.Tensor) else self._zero
        return (self._rounded(values * self._per_unit[i] + zero) - zero) * self._step[i]

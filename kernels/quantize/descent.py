"""Coordinate descent: go over a rounded matrix again, and move single weights where that helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trimtab.kernels.quantize.columns import Columns

if TYPE_CHECKING:
    from trimtab.kernels.formats import Grid

_BLOCK = 128


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    *,
    damping: float = 0.01,
    n_sweeps: int = 2,
    served: torch.Tensor | None = None,
) -> torch.Tensor:
    """Improve codes under a fixed grid.

    GPTQ settles each weight once, when later columns are still exact. Here each column's weights
    are set to the best level given all others, column after column; the squared error of the output
    never grows.

    Args:
        weight: `[n_out, n_in]`, any float.
        hessian: `X^T X`, `[n_in, n_in]`, float32; any positive factor.
        grid: the levels.
        codes: to begin with, `[n_out, n_in]`, uint8; left as they are.
        damping: added to the diagonal, as a share of its mean, as in `gptq`.
        n_sweeps: how often to go over all columns.
        served: what the codes are multiplied as where that is not the grid's values; see `Columns`.

    Returns:
        Better codes, `[n_out, n_in]`, uint8.

    Raises:
        ValueError: the shapes do not fit.

    Source: QuantEase, arXiv 2309.01885, algorithm 1. Differs: starts from GPTQ's codes instead of
        the nearest, and columns go by importance.
    """
    n_in = weight.shape[1]
    if hessian.shape != (n_in, n_in):
        raise ValueError(f"A Hessian {tuple(hessian.shape)} does not fit {n_in} columns.")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    curved = hessian[order][:, order].float()
    curved.diagonal().add_(curved.diagonal().mean() * damping)
    diagonal = curved.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    per_diagonal = (1 / diagonal).tolist()
    columns = Columns(grid, order, served=served)
    # Transposed, so that a column is contiguous.
    wide, rounded = weight.T[order].float(), columns.values(codes)
    for _ in range(n_sweeps):
        # Anew each sweep, so that rounding errors of the sums do not pile up.
        pull = curved @ (wide - rounded)
        for start in range(0, n_in, _BLOCK):
            end = min(start + _BLOCK, n_in)
            near, within = pull[start:end], curved[start:end, start:end]
            moves = torch.empty_like(near)
            for i in range(start, end):
                best = rounded[i] + near[i - start] * per_diagonal[i]
                level = columns.nearest(i, best)
                move = torch.sub(level, rounded[i], out=moves[i - start])
                rounded[i] = level
                near.addr_(within[i - start], move, alpha=-1)
            pull[end:].addmm_(curved[end:, start:end], moves, alpha=-1)
    return grid.encode(rounded[order.argsort()].T)

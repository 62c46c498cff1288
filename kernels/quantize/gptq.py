"""GPTQ: round column by column, and let the columns still to come make up for each error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trimtab.kernels.quantize.columns import Columns

if TYPE_CHECKING:
    from trimtab.kernels.formats import Grid

_BLOCK = 128
# Ten times the damping before a Hessian that still has no factor is called broken.
_TRIES = 8


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    is_by_importance: bool = True,
    served: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a matrix so that its output on the calibration inputs changes as little as it can.

    After each column is rounded, its error is spread over the columns that are not, by the inverse
    Hessian's Cholesky factor: what is left of the error is what no later column can take back.

    Args:
        weight: `[n_out, n_in]`, any float.
        hessian: `X^T X` over the calibration tokens, `[n_in, n_in]`, float32; any positive factor.
        grid: the levels, fitted beforehand ("static groups"), which is why columns may be taken in
            any order whatever the group size.
        damping: added to the diagonal, as a share of its mean.
        is_by_importance: take columns with the largest diagonal first ("act-order"), so that those
            that matter most are rounded while all others can still make up for them.
        served: what the codes are multiplied as where that is not the grid's values; see `Columns`.

    Returns:
        Codes, `[n_out, n_in]`, uint8.

    Raises:
        ValueError: the shapes do not fit, or the Hessian is not finite or has no factor.

    Source: arXiv 2210.17323, algorithm 1; act-order and static groups from
        IST-DASLab/gptq gptq.py. Differs: inputs that never occur (diagonal 0) are rounded to the
        nearest as they are, where the source sets their weights to zero.
    """
    n_out, n_in = weight.shape
    if hessian.shape != (n_in, n_in):
        raise ValueError(f"A Hessian {tuple(hessian.shape)} does not fit {n_in} columns.")
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True)
        if is_by_importance
        else torch.arange(n_in, device=weight.device)
    )
    spread = inverse_factor(hessian[order][:, order], damping=damping)
    per_diagonal = (1 / spread.diagonal()).tolist()
    columns = Columns(grid, order, served=served)
    # Transposed, so that a column is contiguous; both indexing and .float() copy.
    left = weight.T[order].float()
    rounded = torch.empty_like(left)
    for start in range(0, n_in, _BLOCK):
        end = min(start + _BLOCK, n_in)
        errors = torch.empty(end - start, n_out, device=weight.device)
        for i in range(start, end):
            rounded[i] = columns.nearest(i, left[i])
            error = torch.mul(left[i] - rounded[i], per_diagonal[i], out=errors[i - start])
            left[i + 1 : end].addr_(spread[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(spread[start:end, end:].T, errors, alpha=-1)
    return grid.encode(rounded[order.argsort()].T)


def inverse_factor(hessian: torch.Tensor, *, damping: float) -> torch.Tensor:
    """Return U, upper triangular, with `U^T U` the inverse of the damped Hessian, float32.

    Raises:
        ValueError: the Hessian holds NaN or infinity, or no damping makes it positive.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("The Hessian is not finite: the calibration inputs hold NaN or infinity.")
    # In float64: a Hessian of few tokens has a condition number that float32 does not survive.
    full = hessian.double()
    mean = full.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for attempt in range(_TRIES):
        damped = full.clone()
        damped.diagonal().add_(mean * damping * 10**attempt)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if int(fault) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, fault = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(fault) == 0:
                return upper.float()
    raise ValueError("The Hessian has no Cholesky factor, however much it is damped.")

"""What a matrix should be, given that its inputs are already off because of earlier rounding."""

from __future__ import annotations

import torch


def corrected_weight(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, *, damping: float = 0.05
) -> torch.Tensor:
    """Return the matrix whose output on drifted inputs is closest to the original's on true ones.

    With inputs X of the original model and X' of the one rounded so far, it is the least-squares
    solution of `W' X' = W X`, which is then what rounding approximates: the layers behind take back
    what those before have lost.

    Args:
        weight: `[n_out, n_in]`, any float.
        hessian: `X'^T X'`, `[n_in, n_in]`, float32.
        drift: `(X - X')^T X'`, `[n_in, n_in]`, float32, in the Hessian's unit.
        damping: added to the Hessian's diagonal, as a share of its mean: how much the correction
            may lean on directions that the calibration text hardly shows.

    Returns:
        `[n_out, n_in]`, float32; the weight itself where nothing has drifted.

    Raises:
        ValueError: the damped Hessian is not positive.

    Source: the asymmetric objective of GPTAQ, arXiv 2504.02692. Differs: solved in one
        go for the whole matrix, as in Qronos (arXiv 2505.11695), instead of column by column.
    """
    wide = weight.double()
    damped = hessian.double()
    floor = damped.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = damped + damping * floor * torch.eye(
        len(damped), dtype=damped.dtype, device=damped.device
    )
    lower, fault = torch.linalg.cholesky_ex(damped)
    if int(fault):
        raise ValueError("The Hessian is not positive: the inputs hold NaN, infinity or nothing.")
    missing = wide @ drift.double()
    return (wide + torch.cholesky_solve(missing.T, lower).T).float()

"""LoRC: a low-rank matrix beside the rounded one that takes back most of the rounding error."""

from __future__ import annotations

import torch

_DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def lorc(
    error: torch.Tensor, rank: int, *, whitening: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors A, B with `A @ B` close to the error: `y = Q(W) x + A (B x)`.

    Without whitening `A @ B` is the closest matrix of its rank; with it, the one whose output is
    closest on the inputs that the whitening describes.

    Args:
        error: what was lost, `W - Q(W)`, `[n_out, n_in]`, any float.
        rank: 1 to min(n_out, n_in).
        whitening: the root mean square of each input, `[n_in]`; or all of `X^T X`,
            `[n_in, n_in]`, which also knows which inputs go together.

    Returns:
        A `[n_out, rank]` and B `[rank, n_in]`, float32, the singular values' roots in each, so that
        both are of one size in half precision.

    Raises:
        ValueError: a rank the matrix does not have, or whitening of another shape or not finite.

    Source: LoRC, arXiv 2303.08302, section 4, and 2307.09782. Whitening by the diagonal is
        LQER's (arXiv 2402.02446), by the whole second moment QERA's (arXiv 2410.06040).
    """
    n_out, n_in = error.shape
    if not 1 <= rank <= min(n_out, n_in):
        raise ValueError(f"A matrix {n_out} x {n_in} has no correction of rank {rank}.")
    wide = error.double()
    if whitening is None:
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
    elif whitening.shape == (n_in,):
        # An input that never occurs must stay expressible: a zero here would be divided by below.
        rms = whitening.double()
        rms = rms.clamp_min(float(rms.mean()) * 1e-3 + torch.finfo(torch.float32).tiny)
        left, values, right = torch.linalg.svd(wide * rms, full_matrices=False)
        right = right / rms
    elif whitening.shape == (n_in, n_in):
        lower = _root(whitening)
        left, values, right = torch.linalg.svd(wide @ lower, full_matrices=False)
        right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    else:
        raise ValueError(f"Whitening {tuple(whitening.shape)} does not fit {n_in} inputs.")
    root = values[:rank].sqrt()
    # Contiguous: products with the same numbers in other strides differ in their last bits.
    first = (left[:, :rank] * root).float().contiguous()
    return first, (root.unsqueeze(1) * right[:rank]).float().contiguous()


def _root(moment: torch.Tensor) -> torch.Tensor:
    """Return L with `L L^T` the second moment `[n, n]`, damped as little as float64 needs.

    With fewer tokens than inputs it is singular, and what float32 left in it may make it negative.
    """
    wide = moment.double()
    mean = float(wide.diagonal().mean()) + torch.finfo(torch.float32).tiny
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    for damping in _DAMPINGS:
        lower, fault = torch.linalg.cholesky_ex(wide + damping * mean * eye)
        if not int(fault):
            return lower
    raise ValueError("Whitening by this second moment is not possible: it holds NaN or infinity.")

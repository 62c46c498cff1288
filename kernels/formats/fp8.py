"""FP8 E4M3 with a scale for each row: per token for activations, per output channel for weights.

    scale = max |row| / 448,    value = round(row / scale)

Values go through torch's own float8 type, so rounding is to nearest even. torch 2.11 turns what is
beyond 448 into NaN where later versions saturate, hence the clamp.
"""

from __future__ import annotations

import torch

MAX = 448.0
DTYPE = torch.float8_e4m3fn


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of the last dimension.

    Args:
        values: `[..., n]`, any floating dtype. A row that holds NaN or infinity becomes NaN, so
            that a broken activation stays visible; whoever quantises weights refuses them before.

    Returns:
        Values `[..., n]`, float8_e4m3fn, and scales `[..., 1]`, float32, never 0.
    """
    rows = values.float()
    scale = rows.abs().amax(dim=-1, keepdim=True) / MAX
    # A row of zeros, or one so small that its scale is no normal number, has nothing to scale.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (rows / scale).clamp_(-MAX, MAX).to(DTYPE), scale


def dequantize_rows(
    values: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return what `quantize_rows` stored.

    Args:
        values: `[..., n]`, float8_e4m3fn.
        scale: `[..., 1]`, any floating dtype.
        dtype: of the result.
    """
    return (values.float() * scale.float()).to(dtype)


def rounded_rows(values: torch.Tensor) -> torch.Tensor:
    """Return the rows after a trip through FP8, in their own dtype: what W4A8 computes with."""
    return dequantize_rows(*quantize_rows(values), dtype=values.dtype)

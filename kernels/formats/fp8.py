"""FP8 E4M3 with a scale for each row: per token for activations, per output channel for weights.

    scale = max |row| / 448,    value = round(row / scale)

Values go through torch's own float8 type, so rounding is to nearest even. torch 2.11 turns what is
beyond 448 into NaN where later versions saturate, hence the clamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.kernels.formats.rows import row_chunks

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


@dataclass(frozen=True, eq=False)
class Fp8Matrix:
    """A weight in FP8 with a scale for each output channel.

    Attributes:
        values: `[n_out, n_in]`, float8_e4m3fn.
        scale: `[n_out, 1]`, float32.
    """

    values: torch.Tensor
    scale: torch.Tensor

    format: ClassVar[str] = "fp8"

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_out, n_in)`."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.values.device

    @property
    def n_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.numel() + self.scale.numel() * self.scale.element_size()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix, `[n_out, n_in]`."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in row_chunks(*self.shape):
            dense[rows] = dequantize_rows(self.values[rows], self.scale[rows], dtype=dtype)
        return dense

    def to(self, device: torch.device | str) -> Fp8Matrix:
        """Return the matrix on a device."""
        return Fp8Matrix(self.values.to(device), self.scale.to(device))


def quantize_matrix(weight: torch.Tensor) -> Fp8Matrix:
    """Quantise a weight `[n_out, n_in]`, any floating dtype, by output channel.

    Raises:
        ValueError: not a filled matrix, or NaN or infinity in it.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"fp8: a weight must be a filled matrix, not {tuple(weight.shape)}")
    values = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows in row_chunks(*weight.shape):
        if not torch.isfinite(weight[rows]).all():
            raise ValueError("fp8: the weight holds NaN or infinity")
        values[rows], scale[rows] = quantize_rows(weight[rows])
    return Fp8Matrix(values, scale)

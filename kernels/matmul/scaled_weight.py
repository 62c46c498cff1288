"""MXFP4 as Blackwell's tensor cores read it: codes and scales as they are stored."""

from __future__ import annotations

import torch

from trimtab.kernels.formats import Packed
from trimtab.kernels.matmul import operator
from trimtab.kernels.matmul.prepared import PreparedWeight

GROUP = 32
MAJOR = 10
"""Compute capability of the data centre's Blackwell; the desktop's, 12, has no such instruction in
Triton."""
# Not measured on hardware yet. (tokens, rows, columns, warps, stages) of a program.
_TILES = ((16, 128, 256, 4, 4), (64, 128, 256, 4, 4), (128, 128, 128, 4, 4))


@torch.library.custom_op("trimtab::scaled_product", mutates_args=())
def scaled_product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `Q(x) W^T + bias`.

    Args:
        x: `[n_tokens, n_in]`, bfloat16 or float16; a row's elements are neighbours.
        codes: `[n_out, n_in / 2]`, uint8.
        scales: `[n_out, n_in / 32]`, uint8, powers of two.
        bias: `[n_out]` in x's dtype, or None.

    Returns:
        `[n_tokens, n_out]` in x's dtype.

    Raises:
        ValueError: a row whose elements are apart.
    """
    from trimtab.kernels.matmul.scaled_product import w4a8_scaled

    operator.check_rows(x)
    (n_tokens, n_in), n_out = x.shape, codes.shape[0]
    y = x.new_empty(n_tokens, n_out)
    if not n_tokens:
        return y
    fits = (tile for tile in _TILES if tile[0] >= n_tokens or tile is _TILES[-1])
    tokens, rows, columns, warps, stages = next(fits)
    with torch.cuda.device_of(x):
        q, token_scales = operator.quantize_tokens(x, is_ordered=True)
        w4a8_scaled[(-(-n_out // rows), -(-n_tokens // tokens))](
            q,
            token_scales,
            codes,
            scales,
            bias,
            y,
            n_tokens,
            n_out,
            n_in,
            BM=tokens,
            BN=rows,
            BK=columns,
            STAGES=stages,
            num_warps=warps,
        )
    return y


@scaled_product.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


class ScaledWeight(PreparedWeight):
    """MXFP4 codes and scales, for W4A8.

    Attributes:
        packed: the matrix.
    """

    def __init__(self, packed: Packed, *, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.activations = packed.shape, dtype, "fp8"
        self.packed = packed.to(device)

    @classmethod
    def takes(cls, packed: Packed) -> bool:
        """Whether a matrix is MXFP4, by what it stores."""
        parts = packed.parts
        is_power = packed.codebook.name == "e2m1" and parts.scales.dtype == torch.uint8
        return is_power and packed.group_size == GROUP and parts.row_scale is None

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.packed.device

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.n_bytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix."""
        return self.packed.dequantize(dtype)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = scaled_product(
            x.reshape(-1, self.shape[1]), self.packed.packed, self.packed.scales, bias
        )
        return y.view(*x.shape[:-1], self.shape[0])

"""The specification of the products, in float32 and plain torch: what every kernel is held to.

    W4A16:  y = x W^T,           W the dequantised matrix
    W4A8:   y = Q(x) W8^T,       Q rounds each token to E4M3 under its own scale, max |x| / 448,
                                 W8 the matrix with FP4 codes and scales rounded to E4M3 together

Source: W4A8 as in arXiv 2307.09782 (ZeroQuant-FP), FP4 weights and FP8 activations.
Differs: the paper's scales are powers of two, which makes W8 exact and the weights 2 to 12 % worse;
NVFP4's scales with W8 rounded (`tables.py`) are better in all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trimtab.kernels.formats import Packed, fp8
from trimtab.kernels.matmul import tables
from trimtab.kernels.matmul.prepared import Activations


def rows_of(packed: Packed, which: slice) -> Packed:
    """Return some rows of a matrix."""
    return replace(packed, packed=packed.packed[which], parts=packed.parts.rows(which))


def weight(packed: Packed, *, activations: Activations = "same") -> torch.Tensor:
    """Return the matrix that the product computes with, `[n_out, n_in]`, float32."""
    if activations == "same" or packed.codebook.name != "e2m1":
        return packed.dequantize()
    return tables.dequantize(*tables.tops(packed))


def matmul(
    x: torch.Tensor,
    packed: Packed,
    *,
    activations: Activations = "same",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the product in float32.

    Args:
        x: `[..., n_in]`, any floating dtype.
        packed: the matrix.
        activations: `same`, or `fp8`.
        bias: `[n_out]`, or None.

    Returns:
        `[..., n_out]`, float32.
    """
    tokens = x.float()
    if activations == "fp8":
        tokens = fp8.dequantize_rows(*fp8.quantize_rows(tokens))
    product = tokens @ weight(packed, activations=activations).T
    return product if bias is None else product + bias.float()

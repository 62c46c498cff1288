"""An FP8 matrix beside 4-bit ones, ready for products: dequantised once, in the model's type."""

from __future__ import annotations

import torch

from trimtab.kernels.formats import Fp8Matrix
from trimtab.kernels.matmul import Activations
from trimtab.kernels.matmul.dense import DenseWeight


class Fp8Weight(DenseWeight):
    """The dequantised matrix. With `fp8` activations tokens are rounded to E4M3 before it."""

    def __init__(
        self,
        matrix: Fp8Matrix,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activations: Activations,
    ) -> None:
        self.shape, self.dtype, self.activations = matrix.shape, dtype, activations
        self.weight = matrix.to(device).dequantize(dtype)

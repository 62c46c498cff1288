"""An FP8 matrix beside 4-bit ones, ready for products: dequantised once, in the model's type."""

from __future__ import annotations

import torch
from torch.nn import functional

from trimtab.kernels.formats import Fp8Matrix, fp8
from trimtab.kernels.matmul import Activations, PreparedWeight


class Fp8Weight(PreparedWeight):
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
        self.dense_weight = matrix.to(device).dequantize(dtype)

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.dense_weight.device

    @property
    def n_bytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.dense_weight.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix."""
        return self.dense_weight.to(dtype)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = fp8.rounded_rows(x) if self.activations == "fp8" else x
        return functional.linear(tokens, self.dense_weight, bias)

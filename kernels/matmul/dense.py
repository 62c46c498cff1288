"""A matrix that is dequantised once, when it is prepared: CPUs, and GPUs without our kernels.

Decoding FP4 in each call takes a CPU 170 ms for a 2048 x 8192 matrix, and the product with the
dequantised one 1.9 ms (one thread, AVX-512 with bfloat16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.kernels.formats import Packed, fp8
from trimtab.kernels.formats.grid import row_chunks
from trimtab.kernels.matmul import reference
from trimtab.kernels.matmul.prepared import Activations, PreparedWeight


class DenseWeight(PreparedWeight):
    """The dequantised matrix, in the activations' dtype.

    With `fp8` the numbers are W4A8's: the weights are its FP8 levels, and each token is rounded to
    E4M3; what both are multiplied with is rounded to `dtype`.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activations: Activations,
    ) -> None:
        self.shape, self.dtype, self.activations = packed.shape, dtype, activations
        self.weight = torch.empty(packed.shape, dtype=dtype, device=device)
        for rows in row_chunks(*packed.shape):
            part = reference.rows_of(packed, rows)
            self.weight[rows] = reference.weight(part, activations=activations)

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.weight.device

    @property
    def n_bytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.weight.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix, a copy of its own."""
        return self.weight.to(dtype, copy=True)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = fp8.rounded_rows(x) if self.activations == "fp8" else x
        return F.linear(tokens, self.weight, bias)

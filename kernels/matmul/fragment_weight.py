"""A matrix laid out for the Triton kernels."""

from __future__ import annotations

import torch

from trimtab.kernels.formats import Packed
from trimtab.kernels.matmul import operator
from trimtab.kernels.matmul.fragments import COLUMNS, Fragments, column_order, scheme_of
from trimtab.kernels.matmul.prepared import Activations, PreparedWeight


class FragmentWeight(PreparedWeight):
    """Codes in the order of tensor-core fragments, for W4A16 and W4A8.

    Attributes:
        fragments: the matrix.
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
        scheme = scheme_of(packed, dtype=dtype, is_fp8=activations == "fp8")
        self.fragments = Fragments.of(packed, scheme=scheme, device=device)

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.fragments.codes.device

    @property
    def n_bytes(self) -> int:
        """Bytes of codes, scales and rows, padding included."""
        return self.fragments.n_bytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix, decoded by the kernels' own code."""
        it, (n_out, n_in) = self.fragments, self.shape
        with torch.cuda.device_of(it.codes):
            if it.scheme != "fp8":
                return operator.expanded_half(
                    it.codes, it.scales, it.rows, it.scheme, n_in=n_in, dtype=dtype
                )
            levels = operator.expanded_fp8(it.codes, it.scales, n_rows=n_out)
        place_of = column_order("fp8").flatten().argsort().to(self.device)
        ordered = levels.view(n_out, -1, COLUMNS).float()[..., place_of].flatten(1)[:, :n_in]
        return (ordered * it.rows.unsqueeze(1)).to(dtype)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        it = self.fragments
        y = operator.four_bit_product(
            x.reshape(-1, self.shape[1]), it.codes, it.scales, it.rows, bias, it.scheme
        )
        return y.view(*x.shape[:-1], self.shape[0])

"""INT4 on a CPU: torch's packed kernel, which reads a quarter of bfloat16's bytes.

Against the dense bfloat16 product it is 2.3 to 4.4 times as fast for one token, as fast for eight,
and half as fast for 32 (576 x 1536 and 2048 x 8192, one thread, AVX-512 with bfloat16). Memory is
why INT4 is packed for prompts too.
"""

from __future__ import annotations

import torch

from trimtab.kernels.formats import Packed
from trimtab.kernels.matmul.prepared import PreparedWeight

GROUPS = (32, 64, 128, 256)
ROWS = 16
"""Rows come in blocks of this many."""
_MIDDLE = 8  # the kernel computes (code - 8) * scale + zero
_TILES = 1  # torch's `innerKTiles`, which a CPU ignores


class PackedInt4(PreparedWeight):
    """INT4 in the layout of torch's CPU kernel. Scales and zeros are in the activations' dtype."""

    def __init__(self, packed: Packed, *, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.activations = packed.shape, dtype, "same"
        self.group_size = packed.group_size
        codes = packed.codes().cpu().int()
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, _TILES)
        step = packed.parts.to("cpu").steps()
        zeros = packed.zeros
        zero = torch.zeros_like(step) if zeros is None else (_MIDDLE - zeros.cpu().float()) * step
        self.scales_and_zeros = torch.stack((step, zero), -1).transpose(0, 1).contiguous().to(dtype)

    @classmethod
    def takes(cls, packed: Packed) -> bool:
        """Whether torch's kernel takes the matrix."""
        is_int4 = packed.codebook.name == "uint4"
        return is_int4 and packed.group_size in GROUPS and packed.shape[0] % ROWS == 0

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.packed.device

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix: the product with the identity, whose sums have one term each."""
        eye = torch.eye(self.shape[1], dtype=torch.float32)
        exact = self.scales_and_zeros.float()
        columns = torch._weight_int4pack_mm_for_cpu(eye, self.packed, self.group_size, exact)
        return columns.T.contiguous().to(dtype)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.shape[1]).contiguous()
        if not tokens.shape[0]:
            return x.new_empty(*x.shape[:-1], self.shape[0])
        product = torch._weight_int4pack_mm_for_cpu(
            tokens, self.packed, self.group_size, self.scales_and_zeros
        )
        product = product if bias is None else product + bias
        return product.view(*x.shape[:-1], self.shape[0])

"""NVFP4: E2M1 codes, an E4M3 scale for 16 columns, a float32 scale for the tensor.

    value = level[code] * scale * tensor_scale

The tensor scale that we choose is a power of two: the least one with which the largest scale is at
most 448. E4M3 has fifteen octaves of full precision, so the octave that a power of two may waste
costs nothing, and level * scale * tensor_scale stays exact in bfloat16 (six significant bits).
Files of others hold any positive tensor scale.

Source: NVIDIA's NVFP4 as in TransformerEngine and compressed-tensors; arXiv 2509.25149, section 2.
The search over scales is "four over six" (TransformerEngine PR 2972) over all neighbouring scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.kernels.formats import e2m1, fp8, powers
from trimtab.kernels.formats.codebook import E2M1, Codebook
from trimtab.kernels.formats.format import Format, Search
from trimtab.kernels.formats.parts import Parts

GROUP = 16
# Neighbours of amax / 6 among E4M3's values, 6 to 12 % apart: from one that clips the largest
# value to 3/4 of it, to one that maps it to the code of 4.
_OFFSETS = (0, 1, 2, 3, 4, 5, -1, -2, -3)
_SMALLEST, _LARGEST = 1, 126  # bytes of 2^-9 and 448; 0 is zero and 127 is NaN
_LEAST_EXPONENT = -100  # below it the scales themselves would be subnormal in float32


def power_of_two_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the least power of two with which a scale `largest` is at most 448.

    Args:
        largest: the largest scale of a matrix, scalar, float32, not negative.

    Returns:
        Scalar, float32; 1 where `largest` is 0.
    """
    exponent = powers.ceil_log2(largest / fp8.MAX).clamp(min=_LEAST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, scale, 1.0)


@dataclass(frozen=True)
class NVFP4(Format):
    """NVFP4; a scale is never 0, the least is 2^-9, so that a group of zeros divides by no zero."""

    name: str = "nvfp4"
    group_size: int = GROUP

    codebook: ClassVar[Codebook] = E2M1
    scale_bits: ClassVar[float] = 8
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float8_e4m3fn,)
    has_tensor_scale: ClassVar[bool] = True

    def allows(self, group_size: int) -> bool:
        """Only 16."""
        return group_size == GROUP

    def shared_scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor scale."""
        least, most = torch.aminmax(weight)
        return power_of_two_scale(torch.maximum(-least, most).float() / e2m1.MAX)

    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return amax / 6 rounded to E4M3, and its neighbours."""
        assert shared is not None
        wanted = groups.abs().amax(-1) / e2m1.MAX / shared
        nearest = wanted.clamp(max=fp8.MAX).to(fp8.DTYPE).view(torch.uint8).int()
        offsets = _OFFSETS if search == "mse" else _OFFSETS[:1]
        return [
            Parts(
                # E4M3's positive values are in the order of their bytes.
                scales=(nearest + offset)
                .clamp(_SMALLEST, _LARGEST)
                .to(torch.uint8)
                .view(fp8.DTYPE),
                tensor_scale=shared,
            )
            for offset in offsets
        ]

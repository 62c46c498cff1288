"""INT4: codes 0..15, a floating scale for each group, and, if asymmetric, a zero point.

    symmetric:   value = scale * (code - 8),     scale = amax / 7
    asymmetric:  value = scale * (code - zero),  scale = (max - min) / 15,
                                                 zero = round(-min / scale)

Scales are stored in bfloat16 and chosen before rounding, so what is lost in their last bits is part
of the rounding and not added to it.

Source: the affine scheme of compressed-tensors ("pack-quantized") and of torch's int4 kernels.
Differs: compressed-tensors divides the symmetric range by 15 / 2, which clips the largest positive
weight by half a step; the search tries that and smaller scales, `amax` clips nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.kernels.formats import uint4
from trimtab.kernels.formats.codebook import UINT4, Codebook
from trimtab.kernels.formats.format import Format, Search
from trimtab.kernels.formats.parts import Parts

SCALE = torch.bfloat16
_LARGEST_CODE = 7.0  # of the symmetric range -8..7
# Shares of the range that are kept.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class Int4(Format):
    """INT4 with any even group size; 128 and 64 are what kernels are made for."""

    name: str = "int4"
    group_size: int = 128

    codebook: ClassVar[Codebook] = UINT4
    scale_bits: ClassVar[float] = 16
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    )

    @property
    def has_zeros(self) -> bool:
        """Whether the format is asymmetric."""
        return self.name == "int4-asym"

    def allows(self, group_size: int) -> bool:
        """Whether the size is even and positive."""
        return group_size > 0 and group_size % 2 == 0

    def shared_scale(self, weight: torch.Tensor) -> None:
        """Nothing is shared between groups."""

    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return the scale of the whole range, and of smaller ones."""
        shrinks = _SHRINKS if search == "mse" else _SHRINKS[:1]
        if not self.has_zeros:
            largest = groups.abs().amax(-1)
            return [Parts(_stored(largest / _LARGEST_CODE * shrink)) for shrink in shrinks]
        # Zero is always a level: pruned weights and padding stay exactly zero.
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        parts = []
        for shrink in shrinks:
            # Halves first: the whole width of a range of huge weights is infinite.
            scales = _stored((most / 2 - least / 2) / (uint4.MAX / 2) * shrink)
            zeros = (-least * shrink / scales.float()).round().clamp(0, uint4.MAX)
            parts.append(Parts(scales, zeros=zeros.to(torch.uint8)))
        return parts


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in bfloat16: 1 for a group of zeros, never 0 or infinite."""
    tiny, huge = torch.finfo(SCALE).tiny, torch.finfo(SCALE).max
    return torch.where(scales > 0, scales.clamp(tiny, huge), 1.0).to(SCALE)

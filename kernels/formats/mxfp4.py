"""MXFP4: E2M1 codes and a power of two for 32 columns.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.4.1 and 6.3: the exponent of the largest
magnitude, minus 2, the exponent of E2M1's largest. With it magnitudes past 6 saturate; the search
also tries the next power, which clips nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.kernels.formats import powers
from trimtab.kernels.formats.codebook import E2M1, Codebook
from trimtab.kernels.formats.format import Format, Search
from trimtab.kernels.formats.parts import Parts

GROUP = 32
_LARGEST_EXPONENT = 2  # 6 is 1.5 * 2^2


@dataclass(frozen=True)
class MXFP4(Format):
    """MXFP4 of the Open Compute Project."""

    name: str = "mxfp4"
    group_size: int = GROUP

    codebook: ClassVar[Codebook] = E2M1
    scale_bits: ClassVar[float] = 8
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8,)

    def allows(self, group_size: int) -> bool:
        """Only 32."""
        return group_size == GROUP

    def shared_scale(self, weight: torch.Tensor) -> None:
        """Nothing is shared between groups."""

    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return the exponent of the specification, and the next."""
        exponent = powers.floor_log2(groups.abs().amax(-1)) - _LARGEST_EXPONENT
        offsets = (0, 1) if search == "mse" else (0,)
        most = powers.LARGEST_SCALE_EXPONENT
        return [Parts(powers.to_bytes((exponent + i).clamp(max=most))) for i in offsets]

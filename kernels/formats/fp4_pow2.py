"""FP4 whose scales are powers of two apart, ZeroQuant-FP's constraints M1 and M2.

    M1: scale = 2^ceil(log2 S)                     S = amax / 6 of the group
    M2: scale = R / 2^k,  k = floor(log2(R / S))   R = the row's largest S

Between groups only the exponent differs, so a code times its scale is exact in FP8 E4M3, which is
what W4A8 multiplies with: the row's R goes to the product's end.

Source: arXiv 2307.09782, section 4 ("ZeroQuant-FP").
Differs: the paper writes k = ceil(...), which clips the group's largest weights by up to two: 21 %
of error on gaussian weights in groups of 16 where floor and a choice between floor and floor + 1
have 11 %. R has four significant bits, and k ends where R / 2^k would leave E4M3's normal numbers,
so that a matrix in groups of 16 is an NVFP4 matrix too, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.kernels.formats import e2m1, powers
from trimtab.kernels.formats.codebook import E2M1, Codebook
from trimtab.kernels.formats.format import Format, Search
from trimtab.kernels.formats.nvfp4 import power_of_two_scale
from trimtab.kernels.formats.parts import Parts

SMALLEST_GROUP = 16
# E2M1 times 2^-k is exact in E4M3's normal numbers for twelve exponents, 0 to 11.
_MOST_HALVINGS = 11
_LEAST_NORMAL = -6  # exponent of E4M3's smallest normal number


@dataclass(frozen=True)
class _PowerOfTwo(Format):
    codebook: ClassVar[Codebook] = E2M1
    scale_bits: ClassVar[float] = 8
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8,)

    def allows(self, group_size: int) -> bool:
        """Whether the size is 16, 32, 48, ..."""
        return group_size > 0 and group_size % SMALLEST_GROUP == 0


@dataclass(frozen=True)
class M1(_PowerOfTwo):
    """Each group's scale is a power of two; in groups of 32 the bytes are MXFP4's."""

    name: str = "fp4-m1"
    group_size: int = 32

    def shared_scale(self, weight: torch.Tensor) -> None:
        """Nothing is shared between groups."""

    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return the power of two above S, and the one below."""
        exponent = powers.ceil_log2(groups.abs().amax(-1) / e2m1.MAX)
        offsets = (0, -1) if search == "mse" else (0,)
        most = powers.LARGEST_SCALE_EXPONENT
        return [Parts(powers.to_bytes((exponent + i).clamp(max=most))) for i in offsets]


@dataclass(frozen=True)
class M2(_PowerOfTwo):
    """A row has one real scale, its groups have powers of two below it."""

    name: str = "fp4-m2"
    group_size: int = 16

    has_row_scale: ClassVar[bool] = True

    def shared_scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor scale with which NVFP4 would hold the largest R."""
        least, most = torch.aminmax(weight)
        return power_of_two_scale(_rounded_up(torch.maximum(-least, most).float() / e2m1.MAX))

    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return the largest k that clips nothing, and the next."""
        assert shared is not None
        wanted = groups.abs().amax(-1) / e2m1.MAX
        row = torch.maximum(_rounded_up(wanted.amax(-1)), shared * 2.0**_LEAST_NORMAL)
        room = powers.floor_log2(row / shared) - _LEAST_NORMAL
        most = room.clamp(max=_MOST_HALVINGS).unsqueeze(-1)
        # Quotients past float32's range are those of groups of zeros, and of no interest.
        ratio = (row.unsqueeze(-1) / wanted).clamp(max=2.0 ** (_MOST_HALVINGS + 1))
        halvings = powers.floor_log2(torch.where(wanted > 0, ratio, 2.0**_MOST_HALVINGS))
        offsets = (0, 1) if search == "mse" else (0,)
        return [
            Parts(
                powers.to_bytes(-torch.minimum((halvings + offset).clamp(min=0), most)),
                row_scale=row,
            )
            for offset in offsets
        ]


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    """Return the least numbers of four significant bits that are not below `values`, float32."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 16).ceil(), exponent - 4)

"""The two sets of sixteen levels that a 4-bit code can stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trimtab.kernels.formats import e2m1, uint4


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels of the codes 0..15 and how values, in units of the group's step, become codes.

    Attributes:
        name: `e2m1` or `uint4`.
        zero: the code whose level is subtracted where a format stores no zero points.
        nearest: values, float32 -> codes, uint8.
        stochastic: values, float32, generator -> codes, uint8.
        rounded: values, float32 -> the levels they become, float32.
        decode: codes, uint8 -> levels, float32.
    """

    name: str
    zero: float
    nearest: Callable[[torch.Tensor], torch.Tensor]
    stochastic: Callable[..., torch.Tensor]
    rounded: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]


E2M1 = Codebook("e2m1", 0.0, e2m1.nearest, e2m1.stochastic, e2m1.rounded, e2m1.decode)
UINT4 = Codebook("uint4", 8.0, uint4.nearest, uint4.stochastic, uint4.rounded, uint4.decode)

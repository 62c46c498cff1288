"""The same weights in another format, to the last bit: M1 and M2 as the formats that files know."""

from __future__ import annotations

import torch

from trimtab.kernels.formats import fp8, mxfp4, nvfp4, powers
from trimtab.kernels.formats.codebook import E2M1
from trimtab.kernels.formats.packed import Packed
from trimtab.kernels.formats.parts import Parts


def as_mxfp4(packed: Packed) -> Packed:
    """Return an M1 matrix, in groups of a multiple of 32, as MXFP4; wide groups repeat their scale.

    Raises:
        ValueError: not powers of two without a row scale, or other groups.
    """
    if packed.scales.dtype != torch.uint8 or packed.row_scale is not None:
        raise ValueError(f"{packed.format} has scales that MXFP4 has not")
    scales = _repeated(packed, mxfp4.GROUP)
    return mxfp4.MXFP4().stored(packed.packed, Parts(scales))


def as_nvfp4(packed: Packed, *, tensor_scale: torch.Tensor | None = None) -> Packed:
    """Return an M1 or M2 matrix, in groups of a multiple of 16, as NVFP4.

    Args:
        packed: the matrix.
        tensor_scale: of the result, a power of two; None means the least that fits. Matrices that
            a server multiplies as one need the same.

    Raises:
        ValueError: scales that E4M3 cannot hold exactly, or other groups.
    """
    if packed.codebook is not E2M1:
        raise ValueError(f"{packed.format} has levels that NVFP4 has not")
    steps = packed.parts.steps()
    if tensor_scale is None:
        tensor_scale = nvfp4.power_of_two_scale(steps.amax())
    wanted = steps / tensor_scale
    scales = wanted.clamp(max=fp8.MAX).to(fp8.DTYPE)
    if not torch.equal(scales.float(), wanted):
        span = powers.floor_log2(steps.amax()) - powers.floor_log2(steps.amin())
        raise ValueError(
            f"{packed.format}: scales {int(span)} octaves apart are not exact in NVFP4's E4M3"
        )
    packed = Packed(packed.format, packed.group_size, packed.codebook, packed.packed, Parts(scales))
    parts = Parts(_repeated(packed, nvfp4.GROUP), tensor_scale=tensor_scale)
    return nvfp4.NVFP4().stored(packed.packed, parts)


def _repeated(packed: Packed, group_size: int) -> torch.Tensor:
    """Return the scales of groups of `group_size` instead of wider ones."""
    times, rest = divmod(packed.group_size, group_size)
    if rest or not times:
        raise ValueError(
            f"{packed.format} in groups of {packed.group_size} has no scales for {group_size}"
        )
    raw = packed.scales.view(torch.uint8).repeat_interleave(times, dim=1)
    return raw.view(packed.scales.dtype)

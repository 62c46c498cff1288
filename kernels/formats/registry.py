"""The formats by name."""

from __future__ import annotations

from dataclasses import replace

from trimtab.kernels.formats.format import Format
from trimtab.kernels.formats.fp4_pow2 import M1, M2
from trimtab.kernels.formats.int4 import Int4
from trimtab.kernels.formats.mxfp4 import MXFP4
from trimtab.kernels.formats.nvfp4 import NVFP4

FORMATS: dict[str, Format] = {
    format.name: format for format in (NVFP4(), MXFP4(), M1(), M2(), Int4(), Int4(name="int4-asym"))
}


def format_named(name: str, *, group_size: int | None = None) -> Format:
    """Return a format.

    Args:
        name: one of `FORMATS`.
        group_size: columns that share a scale; None means the format's own.

    Raises:
        ValueError: no such format, or one that has no groups of this size.
    """
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no format; allowed: {', '.join(FORMATS)}")
    known = FORMATS[name]
    if group_size is None or group_size == known.group_size:
        return known
    if not known.allows(group_size):
        raise ValueError(f"{name} has no groups of {group_size}; its own are of {known.group_size}")
    return replace(known, group_size=group_size)

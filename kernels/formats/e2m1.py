"""E2M1, the 4-bit float of NVFP4 and MXFP4: two exponent bits, one mantissa bit, a sign.

Magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 by code 0 to 7, and bit 3 is the sign. On the codes the
grid is even: with c(a) = min(2a, a + 2, a/2 + 4), linear between neighbours, a magnitude's code is
c rounded, and a tie of codes is the tie of magnitudes, broken to the even mantissa. The inverse is
max(c/2, c - 2, 2c - 8). So both directions are plain arithmetic, without a table or a search.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3; rounding as PTX
`cvt.rn.satfinite.e2m1x2`.
"""

from __future__ import annotations

import torch

MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest level, ties to the even code, beyond 6 to 6.

    Args:
        values: any shape, float32, finite.

    Returns:
        Codes 0..15 of the same shape, uint8. The sign of a value that becomes zero is kept, as the
        hardware keeps it.
    """
    code = _nearest_magnitude(values.abs()).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def stochastic(values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Round to one of the two neighbours with the odds that make the mean exact.

    Args:
        values: any shape, float32, finite. Beyond 6 they saturate, which no odds make up for.
        generator: on the values' device; None means torch's own.

    Returns:
        Codes 0..15 of the same shape, uint8.

    Source: arXiv 2505.19115, section 3 ("FP4 All the Way").
    """
    size = values.abs().clamp_(max=MAX)
    code = torch.minimum(torch.minimum(size * 2, size + 2), size * 0.5 + 4)
    below = code.floor()
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    # Not floor(code + draw): next to 7 float32 rounds 7 + 0.99999994 up to 8.
    up = draw < code - below
    return (below + up).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the level of each code, float32; code 8 is -0.0."""
    size = _magnitude((codes & 7).float())
    return torch.where(codes >= 8, -size, size)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return `decode(nearest(values))` without making codes, which a search over scales needs not.

    Args:
        values: any shape, float32, finite.
    """
    return _magnitude(_nearest_magnitude(values.abs())).copysign_(values)


def _nearest_magnitude(size: torch.Tensor) -> torch.Tensor:
    # Each branch is rounded before the least is taken: a + 2 itself is not exact in float32, and
    # would turn a value just above a tie into the tie.
    code = (size * 2).round_()
    code = torch.minimum(code, size.round().add_(2))
    return torch.minimum(code, (size * 0.5).round_().add_(4)).clamp_(max=7)


def _magnitude(code: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.maximum(code * 0.5, code - 2), code * 2 - 8)

"""Powers of two as bytes, E8M0: byte b is 2^(b - 127), and 255 is NaN.

Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1; torch.float8_e8m0fnu has the same bytes.
"""

from __future__ import annotations

import torch

BIAS = 127
LARGEST = 254
# Of a scale of E2M1 codes: 6 * 2^126 would be infinite in float32.
LARGEST_SCALE_EXPONENT = 125
_MANTISSA_BITS = 23  # of float32, whose exponent field has the same bias
_SUBNORMAL = 1 << 22  # 2^-127, below float32's normal numbers, as bits


def to_bytes(exponents: torch.Tensor) -> torch.Tensor:
    """Return exponents, integers of any shape, as bytes, saturating at 2^-127 and 2^127."""
    return (exponents + BIAS).clamp(0, LARGEST).to(torch.uint8)


def from_bytes(stored: torch.Tensor) -> torch.Tensor:
    """Return 2^(byte - 127), float32, exact also where it is subnormal."""
    bits = stored.int() << _MANTISSA_BITS
    return torch.where(stored == 0, _SUBNORMAL, bits).view(torch.float32)


def floor_log2(values: torch.Tensor) -> torch.Tensor:
    """Return floor(log2 v) of positive float32 values, int32; -128 for zero."""
    # log2 itself would be off by one next to a power of two.
    mantissa, exponent = torch.frexp(values)
    return torch.where(mantissa > 0, exponent - 1, -128)


def ceil_log2(values: torch.Tensor) -> torch.Tensor:
    """Return ceil(log2 v) of positive float32 values, int32; -128 for zero."""
    mantissa, exponent = torch.frexp(values)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(mantissa > 0, exponent, -128)

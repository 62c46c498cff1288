"""Unsigned 4-bit integers 0..15, the levels of INT4; a group's zero point says which is zero."""

from __future__ import annotations

import torch

MAX = 15.0


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer, ties to even, and saturate at 0 and 15.

    Args:
        values: any shape, float32, finite, zero point already added.

    Returns:
        Codes 0..15 of the same shape, uint8.
    """
    return rounded(values).to(torch.uint8)


def stochastic(values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Round to one of the two neighbours with the odds that make the mean exact.

    Args:
        values: any shape, float32, finite, zero point already added.
        generator: on the values' device; None means torch's own.

    Returns:
        Codes 0..15 of the same shape, uint8.
    """
    code = values.clamp(0.0, MAX)
    below = code.floor()
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return (below + (draw < code - below)).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return each code as float32."""
    return codes.float()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return `decode(nearest(values))`, float32."""
    return values.round().clamp_(0.0, MAX)

"""Two 4-bit codes in a byte: the even column in the low half, as NVFP4 and MXFP4 files have it."""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return codes `[n_out, n_in]`, uint8 0..15, n_in even, as bytes `[n_out, n_in / 2]`."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return bytes `[n_out, n_in / 2]` as codes `[n_out, n_in]`, uint8 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)

"""A quantised matrix as it is stored: two codes in a byte, and the scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trimtab.kernels.formats import nibbles
from trimtab.kernels.formats.codebook import Codebook
from trimtab.kernels.formats.grid import Grid
from trimtab.kernels.formats.parts import Parts
from trimtab.kernels.formats.rows import row_chunks


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantised matrix; `Format.pack` and `Format.stored` make it.

    Attributes:
        format: the format's name.
        group_size: columns that share a scale.
        codebook: what the codes stand for.
        packed: `[n_out, n_in / 2]`, uint8; the even column is the low half.
        parts: the scales.
    """

    format: str
    group_size: int
    codebook: Codebook
    packed: torch.Tensor
    parts: Parts

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_out, n_in)` of the matrix."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def scales(self) -> torch.Tensor:
        """`[n_out, n_groups]` in the format's own type."""
        return self.parts.scales

    @property
    def tensor_scale(self) -> torch.Tensor | None:
        """Scalar, float32, of NVFP4."""
        return self.parts.tensor_scale

    @property
    def row_scale(self) -> torch.Tensor | None:
        """`[n_out]`, float32, of M2."""
        return self.parts.row_scale

    @property
    def zeros(self) -> torch.Tensor | None:
        """`[n_out, n_groups]`, uint8, of asymmetric INT4."""
        return self.parts.zeros

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.packed.device

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.packed.numel() + self.parts.n_bytes

    def codes(self) -> torch.Tensor:
        """Return the codes, 0..15, `[n_out, n_in]`, uint8."""
        return nibbles.unpack(self.packed)

    def grid(self) -> Grid:
        """Return the values the matrix can take."""
        return Grid(self.format, self.group_size, self.shape, self.codebook, self.parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix, `[n_out, n_in]`; arithmetic is float32 with one cast at the end."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in row_chunks(*self.shape):
            part = self.rows(rows)
            dense[rows] = part.grid().decode(part.codes())
        return dense

    def rows(self, which: slice) -> Packed:
        """Return some rows of the matrix."""
        return replace(self, packed=self.packed[which], parts=self.parts.rows(which))

    def to(self, device: torch.device | str) -> Packed:
        """Return the matrix on a device."""
        return replace(self, packed=self.packed.to(device), parts=self.parts.to(device))

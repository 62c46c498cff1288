"""What is stored beside the codes: the scales of a matrix's groups, in their own small types."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from trimtab.kernels.formats import powers


@dataclass(frozen=True, eq=False)
class Parts:
    """The stored scales of a quantised matrix.

    Attributes:
        scales: `[n_out, n_groups]`: float8_e4m3fn (NVFP4), uint8 powers of two (MXFP4, M1, M2), or
            a floating type (INT4).
        tensor_scale: scalar, float32, multiplies every scale (NVFP4), or None.
        row_scale: `[n_out]`, float32, multiplies a row's scales (M2), or None.
        zeros: `[n_out, n_groups]`, uint8, the code that means 0 (asymmetric INT4), or None.
    """

    scales: torch.Tensor
    tensor_scale: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    def steps(self) -> torch.Tensor:
        """Return what one unit of each group is worth, `[n_out, n_groups]`, float32."""
        is_power = self.scales.dtype == torch.uint8
        steps = powers.from_bytes(self.scales) if is_power else self.scales.float()
        if self.tensor_scale is not None:
            steps = steps * self.tensor_scale
        if self.row_scale is not None:
            steps = steps * self.row_scale.unsqueeze(1)
        return steps

    def rows(self, which: slice) -> Parts:
        """Return the parts of some rows."""
        return replace(
            self,
            scales=self.scales[which],
            row_scale=None if self.row_scale is None else self.row_scale[which],
            zeros=None if self.zeros is None else self.zeros[which],
        )

    def to(self, device: torch.device | str) -> Parts:
        """Return the parts on a device."""
        return Parts(
            scales=self.scales.to(device),
            tensor_scale=None if self.tensor_scale is None else self.tensor_scale.to(device),
            row_scale=None if self.row_scale is None else self.row_scale.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
        )

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the four tensors in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is stored here."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

"""What a linear layer holds instead of a weight: a matrix made ready for one device and type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

Activations = Literal["same", "fp8"]
ACTIVATIONS = ("same", "fp8")


class PreparedWeight(ABC):
    """A quantised matrix that can be multiplied with; `prepare` makes it.

    Attributes:
        shape: `(n_out, n_in)`.
        dtype: of the activations it is made for.
        activations: `same` (W4A16), or `fp8` (W4A8): they are rounded to E4M3, token by token.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    activations: Activations

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the matrix is."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Resident bytes of the matrix, scales included."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix that the product computes with, `[n_out, n_in]`."""

    @abstractmethod
    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x W^T + bias` of tokens that `__call__` has checked."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x W^T + bias`.

        Args:
            x: `[..., n_in]` in `dtype`, on the matrix's device.
            bias: `[n_out]` in `dtype`, or None.

        Returns:
            `[..., n_out]` in `dtype`; sums are float32.

        Raises:
            ValueError: tensors of another shape, type or device.
        """
        n_out, n_in = self.shape
        if x.ndim < 1 or x.shape[-1] != n_in or x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f"activations {tuple(x.shape)} of {x.dtype} on {x.device}; this weight was "
                f"prepared for [..., {n_in}] of {self.dtype} on {self.device}"
            )
        if bias is not None and (
            tuple(bias.shape) != (n_out,) or bias.dtype != self.dtype or bias.device != self.device
        ):
            raise ValueError(
                f"bias {tuple(bias.shape)} of {bias.dtype} on {bias.device}; expected ({n_out},) "
                f"of {self.dtype} on {self.device}"
            )
        return self._product(x, bias)

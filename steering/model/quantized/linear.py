"""A linear layer whose weight is a quantised matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trimtab.kernels.matmul import PreparedWeight


class _Product(torch.autograd.Function):
    """x W^T with a gradient for x; the rounding of activations counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PreparedWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        # Dequantised for this layer alone, and gone before the next one's turn.
        return gradient @ ctx.weight.dense(gradient.dtype), None


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a quantised weight and an optional low-rank correction.

        y = x Q(W)^T + (x B^T) A^T + bias

    Source: LoRC, arXiv 2303.08302, section 4.4.

    Attributes:
        in_features: width of x.
        out_features: width of y.
        bias: `[out_features]`, or None.
        prepared: the matrix, made ready for its device; None until it is loaded.
        lorc_a: `[out_features, rank]`, or None.
        lorc_b: `[rank, in_features]`, or None.
        is_exact: leave activations as they are where they would be rounded, see `exact_products`.
    """

    lorc_a: torch.Tensor | None
    lorc_b: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        self.prepared: PreparedWeight | None = None
        self.is_exact = False
        # Not part of a state dict: it would look like a checkpoint's tensors and be none.
        self.register_buffer("lorc_a", None, persistent=False)
        self.register_buffer("lorc_b", None, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight without the correction, `[out_features, in_features]`, dequantised anew.

        For what looks at a layer's weight; nothing that runs the model does. That of an empty
        layer has no numbers: Mamba's layers draw initial values for it while they are built.
        """
        if self.prepared is None:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.prepared.dense(self.prepared.dtype)

    @property
    def n_bytes(self) -> int:
        """Resident bytes of weight and correction."""
        factors = [f for f in (self.lorc_a, self.lorc_b) if f is not None]
        return self._loaded().n_bytes + sum(f.nbytes for f in factors)

    def fill(
        self,
        prepared: PreparedWeight,
        *,
        low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Put the matrix in.

        Args:
            prepared: `[out_features, in_features]`.
            low_rank: A `[out_features, rank]` and B `[rank, in_features]`, any floating dtype.

        Raises:
            ValueError: shapes that do not belong to this layer.
        """
        shape = (self.out_features, self.in_features)
        if tuple(prepared.shape) != shape:
            raise ValueError(f"a weight {tuple(prepared.shape)} for a layer of {shape}")
        if low_rank is not None:
            a, b = low_rank
            if (a.ndim, b.ndim) != (2, 2) or (a.shape[0], b.shape[1]) != shape:
                raise ValueError(f"factors {tuple(a.shape)}, {tuple(b.shape)} for {shape}")
            if a.shape[1] != b.shape[0]:
                raise ValueError(f"factors of ranks {a.shape[1]} and {b.shape[0]}")
            self.lorc_a = a.to(device=prepared.device, dtype=prepared.dtype)
            self.lorc_b = b.to(device=prepared.device, dtype=prepared.dtype)
        self.prepared = prepared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y, `[..., out_features]`, for x, `[..., in_features]`, in the model's dtype."""
        weight = self._loaded()
        if self.is_exact:
            y = functional.linear(x, weight.dense(x.dtype), self.bias)
        elif torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(x, weight)
            y = y if self.bias is None else y + self.bias
        else:
            y = weight(x, self.bias)
        if self.lorc_a is not None and self.lorc_b is not None:
            y = y + functional.linear(functional.linear(x, self.lorc_b), self.lorc_a)
        return y

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        kind = "empty" if self.prepared is None else type(self.prepared).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"

    def _loaded(self) -> PreparedWeight:
        if self.prepared is None:
            raise RuntimeError("this quantised layer has no weight yet")
        return self.prepared


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Leave activations unrounded inside the block, for comparing two ways to run a model.

    Rounding to FP8 turns a difference in the last bit into one of a sixteenth wherever a value is
    next to a boundary, and after a few layers into as much as the rounding itself: in SmolLM2-135M
    two sequences that are run together and alone differ by 0.16 of the logits' spread. That says
    nothing of whether they may be run together. Weights are dequantised for each product, so this
    is slow.
    """
    rounding = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        and module.prepared is not None
        and module.prepared.activations != "same"
    ]
    try:
        for module in rounding:
            module.is_exact = True
        yield
    finally:
        for module in rounding:
            module.is_exact = False

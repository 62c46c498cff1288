"""Operations that are what they are forward and something else backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.where(x == 0, 0.0, y / x).to(y.dtype))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio, None


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return `x`; its gradient is multiplied by `factor`."""
    scaled: torch.Tensor = _Scaled.apply(x, factor)
    return scaled


def as_ratio(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    """Return `function(x)`; its gradient is that of x * c with the constant c = function(x) / x.

    The function must act on each element, whatever it takes from the others: an activation, or a
    norm whose factor counts as constant. Where x is zero so is the gradient.
    """
    with torch.no_grad():
        y = function(x, *args, **options)
    ratio: torch.Tensor = _Ratio.apply(x, y)
    return ratio


def with_gradient_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the numbers of `y`, whose gradient goes to `x`, of the same shape."""
    shown: torch.Tensor = _Instead.apply(x, y)
    return shown

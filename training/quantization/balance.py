"""AWQ on a decoder layer: search each fold's scale by the output of the block it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.kernels.formats import Format
from trimtab.kernels.quantize import AwqChoice, search_scale
from trimtab.steering.model.decoder import hidden_of
from trimtab.training.quantization.folds import Fold, apply_fold
from trimtab.training.quantization.layer_runs import LayerCall, linears
from trimtab.training.quantization.linear_inputs import common_parent

_SAMPLE_ROWS = 8


@torch.inference_mode()
def balance(
    layer: nn.Module,
    call: LayerCall,
    hidden: torch.Tensor,
    fold: Fold,
    magnitude: torch.Tensor,
    fmt: Format,
) -> AwqChoice:
    """Find a fold's scale, and apply it where it is better than none.

    Args:
        layer: changed in place; its function stays the same.
        call: how it is called.
        hidden: what goes into it, `[n_rows, n_tokens, d_model]`; the first eight rows are used.
        fold: where the scale can be hidden.
        magnitude: mean |x| of what the fold's linears read, `[n_in]`.
        fmt: the format the weights will have.

    Source: mit-han-lab/llm-awq auto_scale.py: attention's output decides for queries, keys and
        values, the feed-forward's for gate and up, a lone linear's own for itself.
    """
    block = layer.get_submodule(common_parent(layer, fold.linears))
    runs = _calls_of(block, layer, call, hidden[:_SAMPLE_ROWS].to(magnitude.device))
    modules = [linears(layer)[name] for name in fold.linears]
    weights = [module.weight.detach().clone() for module in modules]
    wanted = [hidden_of(block(*args, **kwargs)).float() for args, kwargs in runs]

    def put(matrices: Sequence[torch.Tensor]) -> None:
        for module, matrix in zip(modules, matrices, strict=True):
            module.weight.data.copy_(matrix)

    def quantize(scaled: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fmt.quantize(scaled).dequantize()

    def loss(matrices: Sequence[torch.Tensor]) -> float:
        put(matrices)
        pairs = zip(runs, wanted, strict=True)
        return sum(
            float((hidden_of(block(*args, **kwargs)).float() - want).square().mean())
            for (args, kwargs), want in pairs
        )

    try:
        choice = search_scale(weights, magnitude, quantize=quantize, loss=loss)
    finally:
        put(weights)
    if choice.exponent > 0:
        apply_fold(layer, fold, choice.scale)
    return choice


def _calls_of(
    block: nn.Module, layer: nn.Module, call: LayerCall, hidden: torch.Tensor
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what a layer calls a block with, row by row."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        for row in hidden:
            call(layer, row.unsqueeze(0))
    finally:
        handle.remove()
    return calls

"""Put a step's steering into a model for the time of a forward pass, and only for that time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.steering.model.decoder import hidden_of
from trimtab.steering.step import SteerStep


@contextmanager
def steered(layers: Sequence[nn.Module], step: SteerStep | None) -> Iterator[None]:
    """Steer every forward pass inside the block.

    Only the layers the step touches get a hook, so an unsteered step costs nothing, and every
    hook is gone when the block is left, however it is left.

    Args:
        layers: the model's decoder layers, first to last.
        step: steering of the flattened `[batch * seq]` tokens; None does nothing.
    """
    handles = []
    try:
        if step is not None:
            for layer in step.layers:
                # First in line, so that whoever else watches the layer sees it steered.
                hook = _hook(step, layer)
                handles.append(layers[layer].register_forward_hook(hook, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured(layers: Sequence[nn.Module], wanted: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Collect the outputs of some layers of every forward pass inside the block.

    Yields:
        A dict that holds, after each forward pass, layer -> hidden states `[batch, seq, d_model]`
        as the model made them (steered, if the pass is; not copied, not detached).
    """
    states: dict[int, Any] = {}
    handles = []

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[layer] = hidden_of(output)

        return hook

    try:
        for layer in wanted:
            handles.append(layers[layer].register_forward_hook(keep(layer)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _hook(step: SteerStep, layer: int) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        flat: torch.Tensor = step.apply(layer, hidden.reshape(-1, hidden.shape[-1]))
        new = flat.reshape(hidden.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook

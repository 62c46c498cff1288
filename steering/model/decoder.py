"""Find a model's decoder layers by watching it run, without a list of architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.steering.errors import ModelLoadError


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of a decoder layer's output (a tensor, or a tuple led by one)."""
    return output[0] if isinstance(output, tuple) else output


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text decoder, also for a multimodal model."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a causal language model, first to last.

    A list of modules qualifies if a forward pass on text runs each of its members once, in order,
    and each gives out hidden states `[1, n_tokens, hidden_size]`. A vision tower does not run on
    text, an expert list does not run in order, so neither qualifies.

    Raises:
        ModelLoadError: an encoder-decoder model, or no list qualifies.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(
            f"{type(model).__name__} is an encoder-decoder; steering needs a decoder-only model."
        )
    width = text_config(model).hidden_size
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    calls: list[int] = []
    handles = []
    n_tokens = 3
    ids = torch.arange(1, n_tokens + 1, device=next(model.parameters()).device).unsqueeze(0)

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = hidden_of(output)
        if isinstance(hidden, torch.Tensor) and tuple(hidden.shape) == (1, n_tokens, width):
            calls.append(id(module))

    members = {id(m): m for modules in lists.values() for m in modules}
    try:
        handles = [module.register_forward_hook(watch) for module in members.values()]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    def qualifies(modules: list[nn.Module]) -> bool:
        wanted = {id(m) for m in modules}
        return [c for c in calls if c in wanted] == [id(m) for m in modules]

    n_layers = getattr(text_config(model), "num_hidden_layers", None)
    found = [modules for modules in lists.values() if qualifies(modules)]
    found.sort(key=lambda modules: (len(modules) != n_layers, -len(modules)))
    if not found:
        raise ModelLoadError(
            f"No decoder layers found in {type(model).__name__}: no module list ran in order with "
            f"outputs of width {width}. Steering needs a decoder-only model."
        )
    return found[0]

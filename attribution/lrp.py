"""AttnLRP: the gradient whose product with the input is layer-wise relevance, and nothing left
behind.

Relevance of a token is x . dF/dx after these changes of the backward pass: norms and activations
count as a constant factor, the product of gate and up projection passes half to each, attention
passes a quarter to queries and keys and half to values. Forward numbers are the model's own.

Source: AttnLRP, arXiv 2402.05602, sections 3.2 to 3.3, in the form of a modified gradient of
rachtibat/LRP-eXplains-Transformers (lxt.efficient).

Differs: lxt patches classes and transformers' table of attention functions for the whole process
and has no way back. Here instances are patched for one backward pass and then restored.

The authors state that LRP is patented and free of charge for personal and scientific purposes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.gradient_scale import as_ratio, scale_gradient, with_gradient_of
from trimtab.steering.errors import listed

# Decoders whose every part has a rule below. Another model may hide a product or a gate inside a
# module's forward that no hook can see, and its scores would be wrong without a sign of it.
MODEL_TYPES = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "gpt2",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
_GATES = ("gate_proj", "gate_up_proj")


def lrp_problem(model: Any) -> str | None:
    """Return why a model has no AttnLRP, or None if it has."""
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        return f"AttnLRP has no rules for {kind!r} models; it knows {listed(MODEL_TYPES)}"
    return None


@contextmanager
def attn_lrp(model: Any) -> Iterator[None]:
    """Change the model's backward pass inside the block (attention's part is the tree's).

    Raises:
        AttributionError: the model's architecture has no rules.
    """
    problem = lrp_problem(model)
    if problem is not None:
        raise AttributionError(f"{problem}. Use another method.", param="method")
    handles = []
    patched: dict[nn.Module, Any] = {}  # to what stood in the instance before, if anything did

    def patch(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        patched[module] = vars(module).get("forward")
        module.forward = forward

    try:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                patch(module, partial(_layer_norm, module, module.forward))
            elif type(module).__name__.endswith("RMSNorm"):
                patch(module, partial(as_ratio, module.forward))
            activation = _activation_of(module)
            if activation is not None and activation not in patched:
                patch(activation, partial(as_ratio, activation.forward))
            if any(hasattr(module, name) for name in _GATES) and hasattr(module, "down_proj"):
                handles.append(module.down_proj.register_forward_pre_hook(_halved))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, before in patched.items():
            if before is None:
                del module.forward  # the class's own is seen again
            else:
                module.forward = before


def _activation_of(module: nn.Module) -> nn.Module | None:
    for name in ("act_fn", "activation_fn", "act"):
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _halved(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (scale_gradient(inputs[0], 0.5), *inputs[1:])


def _layer_norm(
    module: nn.LayerNorm, forward: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The same numbers; its deviation counts as constant, its mean does not."""
    with torch.no_grad():
        y = forward(x)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt().detach()
    linear = (x - x.mean(-1, keepdim=True)) / deviation
    if module.weight is not None:
        linear = linear * module.weight
    return with_gradient_of(linear, y)

"""Decoder layers of a vLLM model that hand their output to the worker's steering.

A layer is armed by giving it a subclass of its own class whose `forward` calls a custom op after
the layer's own. Dynamo traces that like any call, other models of the same class (a drafter) stay
as they are, and the op, opaque to the compiler, looks its worker's state up when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.steering.errors import ModelLoadError

OP = "trimtab::steer"
OP_ALONE = "trimtab::steer_alone"
"""The custom ops, for layers that return (hidden, residual) and for those that return a tensor."""

_library: torch.library.Library | None = None
_steering: WorkerSteering | None = None
_armed_classes: dict[type[nn.Module], type[nn.Module]] = {}


def decoder_layers(model: nn.Module, *, n_layers: int) -> dict[int, nn.Module]:
    """Return the decoder layers that this worker has, by their number in the whole model.

    vLLM keeps all layers of a model in one list; where another worker has a layer, a placeholder
    stands in its place.

    Raises:
        ModelLoadError: there is no list of that length.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    # A vision tower of as many layers would have a longer path than the text model's own.
    named = [(n, m) for n, m in lists if "vision" not in n and "visual" not in n]
    if not named:
        raise ModelLoadError(
            f"No list of {n_layers} decoder layers was found in {type(model).__name__}; trimtab "
            "cannot steer this model on vLLM."
        )
    _, found = min(named, key=lambda one: len(one[0]))
    return {i: layer for i, layer in enumerate(found) if type(layer).__name__ != "PPMissingLayer"}


def arm(layers: dict[int, nn.Module], steering: WorkerSteering) -> None:
    """Let the layers hand their output to `steering` from now on."""
    global _steering
    register_ops()
    _steering = steering
    for number, layer in layers.items():
        layer.trimtab_layer = number  # type: ignore[assignment]
        layer.__class__ = _armed(type(layer))


def register_ops() -> None:
    """Define the custom ops, once a process."""
    global _library
    if _library is not None:
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    _library = torch.library.Library("trimtab", "FRAGMENT")
    for name, op, mutated in (
        (OP, _steer, ["hidden", "residual"]),
        (OP_ALONE, _steer_alone, ["hidden"]),
    ):
        direct_register_custom_op(
            name.partition("::")[2],
            op,
            mutates_args=mutated,
            fake_impl=_fake if len(mutated) == 2 else _fake_alone,
            target_lib=_library,
        )


def _steer(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    if _steering is not None and _steering.step is not None:
        _steering.at_layer(layer, hidden, residual)


def _steer_alone(hidden: torch.Tensor, layer: int) -> None:
    if _steering is not None and _steering.step is not None:
        _steering.at_layer(layer, hidden, None)


def _fake(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    return None


def _fake_alone(hidden: torch.Tensor, layer: int) -> None:
    return None


def _armed(kind: type[Any]) -> type[nn.Module]:
    known = _armed_classes.get(kind)
    if known is not None:
        return known

    class Armed(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            is_pair = isinstance(output, tuple) and len(output) > 1 and output[1] is not None
            hidden = output[0] if isinstance(output, tuple) else output
            if torch.compiler.is_compiling():
                if is_pair:
                    torch.ops.trimtab.steer(hidden, output[1], self.trimtab_layer)
                else:
                    torch.ops.trimtab.steer_alone(hidden, self.trimtab_layer)
            elif _steering is not None and _steering.step is not None:
                _steering.at_layer(self.trimtab_layer, hidden, output[1] if is_pair else None)
            return output

    Armed.__name__ = Armed.__qualname__ = f"Steered{kind.__name__}"
    _armed_classes[kind] = Armed
    return Armed

"""Run a model's decoder layers one at a time on calibration rows; read what their linears get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.decoder import find_decoder_layers, hidden_of


class _Enough(Exception):
    """Everything that was wanted has been seen; the rest of the pass is not needed."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """How the model calls a layer, besides the hidden states.

    Attributes:
        args: further positional arguments.
        kwargs: keyword arguments: positions, masks.
        keyword: the name hidden states are passed under; None if they come first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer on hidden states `[1, n_tokens, d_model]` and return its own."""
        if self.keyword is None:
            return hidden_of(layer(hidden, *self.args, **self.kwargs))
        return hidden_of(layer(*self.args, **self.kwargs, **{self.keyword: hidden}))

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerCall:
        """Return the same call with its tensors elsewhere, floating ones of this type."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, tuple | list):
                return type(value)(moved(v) for v in value)
            if isinstance(value, dict):
                return {k: moved(v) for k, v in value.items()}
            return value

        return LayerCall(moved(self.args), moved(self.kwargs), self.keyword)


@dataclass(frozen=True, eq=False)
class LayerRuns:
    """A model's layers, and how to run each by itself.

    Rows go one at a time and are equally long, so that what the model passes to a layer is the same
    for every row.

    Attributes:
        names: each layer's name in the model.
        layers: the decoder layers, first to last.
        calls: how the model calls each.
        hidden: what goes into the first, `[n_rows, n_tokens, d_model]`, the model's type.
    """

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    calls: tuple[LayerCall, ...]
    hidden: torch.Tensor


@torch.inference_mode()
def layer_runs(model: Any, ids: torch.Tensor) -> LayerRuns:
    """Find the layers and what goes into the first.

    Args:
        model: a causal language model in eval mode.
        ids: calibration rows, `[n_rows, n_tokens]`, int64.

    Raises:
        ModelLoadError: no decoder layers, or a layer that cannot be run by itself because it needs
            what the ones before it left behind.
    """
    layers = find_decoder_layers(model)
    own_names = {id(module): name for name, module in model.named_modules()}
    device = next(model.parameters()).device
    calls: dict[int, LayerCall] = {}
    states: dict[int, torch.Tensor] = {}

    def before(at: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else _hidden_keyword(kwargs)
            given = kwargs[keyword] if keyword is not None else args[0]
            rest = {k: v for k, v in kwargs.items() if k != keyword}
            calls[at] = LayerCall(args[1:] if args else (), rest, keyword)
            states[at] = given

        return hook

    handles = [
        layer.register_forward_pre_hook(before(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    out: list[torch.Tensor] = []
    handles.append(layers[-1].register_forward_hook(lambda m, i, o: out.append(hidden_of(o))))
    try:
        model(input_ids=ids[:1].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    _check_alone(layers, calls, states, out[0], type(model).__name__)
    hidden = torch.cat([_first_input(model, layers[0], row, device) for row in ids])
    ordered = tuple(calls[i] for i in range(len(layers)))
    return LayerRuns(
        tuple(own_names[id(layer)] for layer in layers), tuple(layers), ordered, hidden
    )


def _hidden_keyword(kwargs: dict[str, Any]) -> str:
    if "hidden_states" not in kwargs:
        raise ModelLoadError(
            f"A decoder layer takes no hidden states that trimtab knows; it takes "
            f"{', '.join(sorted(kwargs))}."
        )
    return "hidden_states"


def _check_alone(
    layers: Sequence[nn.Module],
    calls: dict[int, LayerCall],
    states: dict[int, torch.Tensor],
    last: torch.Tensor,
    name: str,
) -> None:
    """Compare each layer run by itself with what it did inside the model."""
    wanted = [*(states[i] for i in range(1, len(layers))), last]
    for i, (layer, want) in enumerate(zip(layers, wanted, strict=True)):
        got = calls[i](layer, states[i])
        if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
            raise ModelLoadError(
                f"Layer {i} of this {name} gives other states by itself than inside the model, "
                "so it cannot be quantised layer by layer. Serve the model unquantised."
            )


def _first_input(
    model: Any, layer: nn.Module, row: torch.Tensor, device: torch.device
) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=row.unsqueeze(0).to(device), use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0].cpu()


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return a layer's linear modules by name, those with a matrix of their own."""
    return {
        name: module
        for name, module in layer.named_modules()
        if type(module) is nn.Linear and module.weight.ndim == 2
    }


@torch.inference_mode()
def shared_inputs(layer: nn.Module, call: LayerCall, hidden: torch.Tensor) -> list[list[str]]:
    """Return names of linears that read the same tensor, in the order they run.

    Args:
        layer: the layer.
        call: how it is called.
        hidden: one row, `[1, n_tokens, d_model]`.

    Returns:
        Groups that together name every linear that runs, once each.
    """
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in names for _, names in groups):
                return
            for given, names in groups:
                if given is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return see

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears(layer).items()]
    try:
        call(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in groups]


@contextmanager
def reading(module: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show a linear's inputs, `[n_tokens, n_in]`, and end the pass behind them.

    The pass must be run by `until_read`.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0].flatten(0, -2))
        raise _Enough

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def until_read(call: LayerCall, layer: nn.Module, hidden: torch.Tensor) -> bool:
    """Run a layer up to the linear that is being read; return whether it came that far."""
    try:
        call(layer, hidden)
    except _Enough:
        return True
    return False

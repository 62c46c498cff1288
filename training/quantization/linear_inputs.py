"""What a group of linears reads on the calibration text, summed up so that it need not be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.kernels.formats import fp8
from trimtab.training.quantization.layer_runs import LayerCall, reading, until_read

_SAMPLE_TOKENS = 512


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """The inputs X of linears that read the same tensor.

    Attributes:
        hessian: `X^T X / n_tokens`, `[n_in, n_in]`, float32.
        magnitude: mean |x| of each input, `[n_in]`, float32.
        sample: at most 512 of the inputs, evenly spread, `[n, n_in]`.
        n_tokens: how many were summed up; 0 for an expert that no token chose.
    """

    hessian: torch.Tensor
    magnitude: torch.Tensor
    sample: torch.Tensor
    n_tokens: int


@torch.inference_mode()
def read_inputs(
    layer: nn.Module,
    call: LayerCall,
    hidden: torch.Tensor,
    name: str,
    *,
    activations: str = "same",
) -> LinearInputs:
    """Run calibration rows up to a linear and sum up what it reads.

    Args:
        layer: the layer, quantised as far as it is.
        call: how it is called.
        hidden: what goes into it, `[n_rows, n_tokens, d_model]`.
        name: of the linear.
        activations: `fp8` rounds what is read, as the engine will.
    """
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    device = linear.weight.device
    n_in = linear.in_features
    hessian = torch.zeros(n_in, n_in, device=device)
    magnitude = torch.zeros(n_in, device=device)
    sample: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    n_tokens = 0
    per_row = max(1, _SAMPLE_TOKENS // max(1, len(hidden)))
    for i in range(len(hidden)):
        given = _read(layer, call, hidden[i : i + 1].to(device), linear, seen)
        if given is None:
            continue
        if activations == "fp8":
            given = fp8.rounded_rows(given)
        wide = given.float()
        hessian.addmm_(wide.T, wide)
        magnitude += wide.abs().sum(0)
        n_tokens += len(wide)
        sample.append(wide[:: max(1, len(wide) // per_row)][:per_row])
    count = max(1, n_tokens)
    return LinearInputs(
        hessian=hessian / count,
        magnitude=magnitude / count,
        sample=torch.cat(sample) if sample else torch.zeros(0, n_in, device=device),
        n_tokens=n_tokens,
    )


def _read(
    layer: nn.Module,
    call: LayerCall,
    hidden: torch.Tensor,
    linear: nn.Module,
    seen: list[torch.Tensor],
) -> torch.Tensor | None:
    seen.clear()
    with reading(linear, seen.append):
        until_read(call, layer, hidden)
    return seen[0] if seen else None


def common_parent(layer: nn.Module, names: Sequence[str]) -> str:
    """Return the name of the smallest module that holds these linears; a lone one is its own."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

"""Find where a column's scale can be hidden in what comes before, by trying it on the layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from trimtab.training.quantization.layer_runs import LayerCall, linears

Kind = Literal["norm", "norm+1", "rows", "none"]
# A fold that holds leaves float32 rounding of what the scales alone would change; one that does
# not, about as much as they change.
_CLOSE = 0.01


@dataclass(frozen=True)
class Fold:
    """A module that can divide what a group of linears reads.

    Attributes:
        before: its name in the layer.
        kind: `norm` (a weight a channel), `norm+1` (one that is used as 1 + weight), or `rows`
            (a linear whose rows are those channels). `none` divides nowhere: half a fold, to see
            what the scales alone would change.
        linears: names of the linears that read what it makes.
    """

    before: str
    kind: Kind
    linears: tuple[str, ...]


def find_folds(
    layer: nn.Module, call: LayerCall, hidden: torch.Tensor, groups: Sequence[Sequence[str]]
) -> tuple[Fold, ...]:
    """Find the folds of a layer, tried on a float32 copy: the layer's output may not change.

    Nothing is known of architectures: every module whose channels match is tried with random
    scales,
    and kept if dividing there and multiplying the group's columns leaves the output as it was. So a
    norm whose output something else reads as well, or a value projection whose heads are shared, is
    no fold.

    Args:
        layer: with its original weights; left as it is.
        call: how it is called.
        hidden: one row, `[1, n_tokens, d_model]`.
        groups: linears that read one input, as `shared_inputs` gives them.

    Returns:
        At most one fold a group; groups without one are left out.
    """
    trial = copy.deepcopy(layer).float()
    device = hidden.device
    alone = call.to(device, torch.float32)
    rows = hidden.float()
    want = alone(trial, rows)
    generator = torch.Generator().manual_seed(0)
    found = []
    for names in groups:
        n_in = linears(trial)[names[0]].in_features
        scale = torch.empty(n_in).uniform_(0.5, 2.0, generator=generator).to(device)

        def changed_by(
            fold: Fold, names: Sequence[str] = names, scale: torch.Tensor = scale
        ) -> float:
            """Return how far the output is off, the first token's outliers aside."""
            kept = [(p, p.detach().clone()) for p in _touched(trial, fold)]
            apply_fold(trial, fold, scale)
            got = alone(trial, rows)
            for parameter, value in kept:
                parameter.data.copy_(value)
            off = (got - want).abs()
            return float((off[:, 1:] if off.shape[1] > 1 else off).mean())

        alone_changes = changed_by(Fold("", "none", tuple(names)))
        for before, kind in _candidates(trial, names, n_in):
            fold = Fold(before, kind, tuple(names))
            if changed_by(fold) < _CLOSE * alone_changes:
                found.append(fold)
                break
    return tuple(found)


def apply_fold(layer: nn.Module, fold: Fold, scale: torch.Tensor) -> None:
    """Multiply the columns of the fold's linears by a scale, and divide what they read.

    Args:
        layer: changed in place.
        fold: where.
        scale: `[n_in]`, positive.
    """
    by_name = dict(layer.named_modules())
    for name in fold.linears:
        weight = by_name[name].weight
        weight.data.copy_(weight.float() * scale)
    if fold.kind == "none":
        return
    before = by_name[fold.before]
    weight = before.weight
    if fold.kind == "rows":
        weight.data.copy_(weight.float() / scale.unsqueeze(1))
    elif fold.kind == "norm":
        weight.data.copy_(weight.float() / scale)
    else:
        weight.data.copy_((1 + weight.float()) / scale - 1)
    bias = getattr(before, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.data.copy_(bias.float() / scale)


def _candidates(layer: nn.Module, names: Sequence[str], n_in: int) -> list[tuple[str, Kind]]:
    """Return the modules whose channels are as many as the group's inputs, norms first."""
    norms: list[tuple[str, Kind]] = []
    rows: list[tuple[str, Kind]] = []
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or name in names:
            continue
        if weight.shape == (n_in,):
            norms += [(name, "norm"), (name, "norm+1")]
        elif type(module) is nn.Linear and module.out_features == n_in:
            rows.append((name, "rows"))
    return norms + rows


def _touched(layer: nn.Module, fold: Fold) -> list[torch.Tensor]:
    by_name = dict(layer.named_modules())
    changed = [by_name[name].weight for name in fold.linears]
    if fold.kind != "none":
        before = by_name[fold.before]
        bias = getattr(before, "bias", None)
        changed += [before.weight, *([bias] if isinstance(bias, torch.Tensor) else [])]
    return changed

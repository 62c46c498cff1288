"""Which linears lose most in four bits, and which of them eight bits are best spent on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.kernels.formats import Format
from trimtab.training.quantization.layer import run_rows
from trimtab.training.quantization.layer_runs import LayerRuns, linears, shared_inputs
from trimtab.training.quantization.settings import Precision

_ROWS = 4


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one group of linears does.

    Attributes:
        names: full names of linears that read one input and are served as one.
        n_weights: in all of them.
        bits: a weight in four bits, scales included.
        bits_fp8: a weight in FP8.
        damage: squared change of the layer's output, as a share of the output's own square.
    """

    names: tuple[str, ...]
    n_weights: int
    bits: float
    bits_fp8: float
    damage: float


@torch.inference_mode()
def sensitivities(
    runs: LayerRuns, fmt: Format, *, progress: Callable[[int, int], None] | None = None
) -> list[Sensitivity]:
    """Round each group of linears alone, to the nearest, and see how far the layer's output moves.

    No gradient is needed, and what happens to the error inside the layer (softmax, products,
    residual) counts. Four calibration rows are used; the first token of a row is left out, for its
    outliers drown everything else.

    Args:
        runs: the original model's layers; left as they are.
        fmt: of 4-bit matrices; groups it cannot hold are left out.
        progress: told of layers done and in all.
    """
    found = []
    hidden = runs.hidden[:_ROWS]
    for i, (name, layer) in enumerate(zip(runs.names, runs.layers, strict=True)):
        call = runs.calls[i]
        device = next(layer.parameters()).device
        wanted = run_rows(layer, call, hidden)
        size = wanted[:, 1:].float().square().sum().clamp_min(1e-30)
        for group in shared_inputs(layer, call, hidden[:1].to(device)):
            modules = {n: linears(layer)[n] for n in group}
            if any(module.in_features % fmt.group_size for module in modules.values()):
                continue
            originals = {n: module.weight.detach().clone() for n, module in modules.items()}
            for module in modules.values():
                module.weight.data.copy_(fmt.quantize(module.weight, search="mse").dequantize())
            moved = run_rows(layer, call, hidden)
            for n, module in modules.items():
                module.weight.data.copy_(originals[n])
            off = (moved - wanted)[:, 1:].float().square().sum()
            found.append(_sensitivity(name, modules, fmt, float(off / size)))
        hidden = wanted
        if progress is not None:
            progress(i + 1, len(runs.layers))
    return found


def raise_precision(
    found: list[Sensitivity], precisions: Mapping[str, Precision], *, bits: float
) -> dict[str, Precision]:
    """Give FP8 to the groups where it spares most damage a byte, while the average allows it.

    Args:
        found: all groups.
        precisions: what is decided already, by full name; those are not touched.
        bits: average a weight that may be spent over the groups found.

    Returns:
        The precisions with the raised ones.

    Source: greedy choice by damage spared per bit, as in HAWQ-V3's knapsack (arXiv 2011.10680),
        with a measured layer error in place of the Hessian's trace.
    """
    raised = dict(precisions)
    free = [s for s in found if all(raised.get(n, "4-bit") == "4-bit" for n in s.names)]
    room = sum((bits - s.bits) * s.n_weights for s in free)
    for s in sorted(
        free, key=lambda s: s.damage / ((s.bits_fp8 - s.bits) * s.n_weights), reverse=True
    ):
        cost = (s.bits_fp8 - s.bits) * s.n_weights
        if cost <= room:
            room -= cost
            raised |= dict.fromkeys(s.names, "fp8")
    return raised


def _sensitivity(
    layer_name: str, modules: Mapping[str, nn.Linear], fmt: Format, damage: float
) -> Sensitivity:
    counts = [m.weight.numel() for m in modules.values()]
    shapes = [(m.out_features, m.in_features) for m in modules.values()]
    n_weights = sum(counts)
    four = sum(fmt.bits(shape) * n for shape, n in zip(shapes, counts, strict=True))
    eight = sum((8 + 32 / shape[1]) * n for shape, n in zip(shapes, counts, strict=True))
    names = tuple(f"{layer_name}.{n}" for n in modules)
    return Sensitivity(names, n_weights, four / n_weights, eight / n_weights, damage)

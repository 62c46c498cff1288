"""Quantise one decoder layer: balance it, then its linears in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import nn

from trimtab.kernels.formats import Format
from trimtab.training.quantization.balance import balance
from trimtab.training.quantization.folds import find_folds
from trimtab.training.quantization.layer_result import LayerResult
from trimtab.training.quantization.layer_runs import LayerCall, linears, shared_inputs
from trimtab.training.quantization.linear_inputs import read_inputs
from trimtab.training.quantization.matrices import Quantized, quantize_group
from trimtab.training.quantization.settings import Precision, QuantizeSettings


def quantize_layer(
    layer: nn.Module,
    name: str,
    call: LayerCall,
    hidden: torch.Tensor,
    fmt: Format,
    settings: QuantizeSettings,
    precisions: Mapping[str, Precision],
) -> tuple[LayerResult, torch.Tensor]:
    """Quantise a layer in place and run the calibration rows through it.

    Every group of linears sees inputs that come through the linears before it as they are after
    rounding ("true sequential").

    Args:
        layer: with its original weights, where it is to be computed.
        name: in the model.
        call: how the model calls it.
        hidden: the rows in front of it, through the layers as quantised so far, on the CPU,
            `[n_rows, n_tokens, d_model]`.
        fmt: of 4-bit matrices.
        settings: the method and its knobs.
        precisions: what is asked for a linear, by its full name in the model; others get 4 bits.

    Returns:
        What became of the layer, and what comes out of it; what went in if nothing is calibrated.
    """
    device = next(layer.parameters()).device
    row = hidden[:1].to(device)
    before = {key: value.detach().clone() for key, value in layer.named_parameters()}
    groups = shared_inputs(layer, call, row)
    exponents: dict[str, float] = {}
    if settings.method in ("awq", "awq+gptq"):
        for fold in find_folds(layer, call, row, groups):
            if _asked(fold.linears, name, precisions) == "4-bit" and _fits(
                layer, fold.linears, fmt
            ):
                read = read_inputs(layer, call, hidden, fold.linears[0])
                choice = balance(layer, call, hidden, fold, read.magnitude, fmt)
                exponents[fold.before] = choice.exponent
    done: dict[str, Quantized] = {}
    kept = {n: "it did not run on text" for n in linears(layer) if n not in chain(*groups)}
    for names in groups:
        precision = _asked(names, name, precisions)
        if precision == "4-bit" and not _fits(layer, names, fmt):
            width = linears(layer)[names[0]].in_features
            reason = f"its {width} inputs are no multiple of the group of {fmt.group_size}"
            kept |= dict.fromkeys(names, reason)
            continue
        if precision == "kept":
            kept |= dict.fromkeys(names, "asked to be kept")
            continue
        inputs = None
        if settings.needs_calibration:
            inputs = read_inputs(layer, call, hidden, names[0], activations=settings.activations)
        weights = {n: linears(layer)[n].weight for n in names}
        for n, quantized in quantize_group(weights, inputs, fmt, settings, precision).items():
            done[n] = quantized
            quantized.put_into(layer, n, settings.activations)
    # Norms, and whatever else folds went through: it may be a linear that was kept.
    taken = {f"{n}.weight" for n in done}
    changed = {
        key: value.detach().clone()
        for key, value in layer.named_parameters()
        if key not in taken and not value.equal(before[key])
    }
    result = LayerResult(name, done, changed, kept, exponents)
    if not settings.needs_calibration:
        return result, hidden  # nothing reads them
    return result, run_rows(layer, call, hidden)


@torch.inference_mode()
def run_rows(layer: nn.Module, call: LayerCall, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a layer makes of rows `[n_rows, n_tokens, d_model]`, on the CPU."""
    device = next(layer.parameters()).device
    out = torch.empty_like(hidden)
    for i in range(len(hidden)):
        out[i] = call(layer, hidden[i : i + 1].to(device))[0]
    return out


def _asked(names: Sequence[str], layer_name: str, precisions: Mapping[str, Precision]) -> Precision:
    """Return the highest precision that is asked for any of the linears: they are served as one."""
    asked = {precisions.get(f"{layer_name}.{n}", "4-bit") for n in names}
    return "kept" if "kept" in asked else "fp8" if "fp8" in asked else "4-bit"


def _fits(layer: nn.Module, names: Sequence[str], fmt: Format) -> bool:
    return all(linears(layer)[n].in_features % fmt.group_size == 0 for n in names)

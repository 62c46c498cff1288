"""Quantise a model layer by layer: text through the layers done so far, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.kernels.formats import Format
from trimtab.steering.errors import DataError, ModelLoadError
from trimtab.training.quantization.layer import quantize_layer, run_rows
from trimtab.training.quantization.layer_result import LayerResult
from trimtab.training.quantization.layer_runs import LayerRuns, layer_runs, linears
from trimtab.training.quantization.progress_folder import ProgressFolder
from trimtab.training.quantization.settings import Precision, QuantizeSettings

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Walk:
    """A model about to be quantised.

    Attributes:
        runs: its layers and what goes into the first.
        fmt: of the 4-bit matrices.
        precisions: what is asked for single linears, by full name.
        settings: the rest.
    """

    runs: LayerRuns
    fmt: Format
    precisions: dict[str, Precision]
    settings: QuantizeSettings


def begin_walk(model: Any, ids: torch.Tensor, settings: QuantizeSettings) -> Walk:
    """Look a model over before anything is changed.

    Args:
        model: a causal language model in eval mode.
        ids: calibration rows, `[n_rows, n_tokens]`.
        settings: what to make.

    Raises:
        ModelLoadError: no decoder layers, or none that can be run alone, or no linears in them.
        DataError: a pattern to keep that names nothing.
    """
    runs = layer_runs(model, ids)
    names = {
        f"{name}.{inner}": linear
        for name, layer in zip(runs.names, runs.layers, strict=True)
        for inner, linear in linears(layer).items()
    }
    if not names:
        raise ModelLoadError(
            f"The decoder layers of this {type(model).__name__} hold no nn.Linear, and nothing "
            "else can be quantised. Serve the model as it is."
        )
    for pattern, _ in settings.keep:
        if not any(QuantizeSettings(keep=((pattern, "bf16"),)).kept(n) == "kept" for n in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise DataError(f"No linear's name ends in {pattern!r}; there are {', '.join(ends)}.")
    fmt = settings.format_for(tuple({linear.in_features for linear in names.values()}))
    return Walk(runs, fmt, {name: settings.kept(name) for name in names}, settings)


def walk(
    begun: Walk, folder: ProgressFolder, *, n_done: int, progress: Progress | None = None
) -> Iterator[LayerResult]:
    """Quantise the layers in place, first to last, and yield each when it is on the disk.

    Only one layer's statistics are held at a time: besides the model there are the calibration
    rows' hidden states, and a Hessian or two of the widest matrix.

    Args:
        begun: the model.
        folder: where done layers are kept.
        n_done: layers there from an earlier run; they are read instead of made.
        progress: told of layers done and in all.
    """
    settings, runs = begun.settings, begun.runs
    with torch.inference_mode():
        hidden = runs.hidden
        for i, (name, layer) in enumerate(zip(runs.names, runs.layers, strict=True)):
            call = runs.calls[i]
            if progress is not None:
                progress("Quantising layers", i, len(runs.layers))
            if i < n_done:
                result = folder.layer(i)
                hidden = _again(result, layer, call, hidden, settings)
            else:
                result, hidden = quantize_layer(
                    layer, name, call, hidden, begun.fmt, settings, begun.precisions
                )
                folder.keep_layer(i, result)
            yield result
    if progress is not None:
        progress("Quantising layers", len(runs.layers), len(runs.layers))


def _again(
    result: LayerResult, layer: Any, call: Any, hidden: torch.Tensor, settings: QuantizeSettings
) -> torch.Tensor:
    """Put a layer of an earlier run in place, and run the rows through it."""
    result.put_into(layer, settings.activations)
    return run_rows(layer, call, hidden) if settings.needs_calibration else hidden

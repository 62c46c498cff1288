"""From a loaded model to a quantised folder: text, layers, files, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.quantized import QuantizationFacts, QuantizedFolderWriter
from trimtab.training.quantization.calibration_text import CalibrationText
from trimtab.training.quantization.layer_result import LayerResult
from trimtab.training.quantization.perplexity import nll
from trimtab.training.quantization.progress_folder import ProgressFolder
from trimtab.training.quantization.report import LinearReport, QuantizationReport, linear_reports
from trimtab.training.quantization.sensitivity import raise_precision, sensitivities
from trimtab.training.quantization.settings import QuantizeSettings
from trimtab.training.quantization.source_folder import SourceFolder
from trimtab.training.quantization.walk import Walk, begin_walk, walk

Progress = Callable[[str, int, int], None]
# Big enough for any embedding but the largest, small enough for two of them beside a model.
_SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Measure:
    """A text to measure perplexity on.

    Attributes:
        rows: `[n_rows, n_tokens]`, int64.
        name: what it is, in a phrase.
    """

    rows: torch.Tensor
    name: str


def quantize_model(
    loaded: LoadedModel,
    target: Path,
    settings: QuantizeSettings,
    *,
    text: Callable[[], CalibrationText],
    text_name: str,
    measure: Measure | None = None,
    is_measured: bool = True,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantise a model into a folder that both engines, vLLM and transformers can load.

    What is done is kept in `NAME.progress` beside the target. Calling again with the same model,
    settings and text after an interruption, however rude, goes on with the layer it was at.

    Args:
        loaded: the model; its weights are overwritten on the way.
        target: the folder to write; it must not exist.
        settings: what to make.
        text: gives the calibration text; called once for a target, not again after an interruption.
        text_name: what tells this text from others: a file's hash, or the seed and its size.
        measure: what to measure perplexity on; None takes the rows that calibration leaves out.
        is_measured: whether to measure it at all.
        progress: told of a stage's name, and steps done and in all.

    Raises:
        ModelLoadError: the target exists, or a model that cannot be quantised or written.
        DataError: settings that do not fit the model, or an interrupted run that was another.
    """
    if target.exists():
        raise ModelLoadError(f"{target} exists already; give another folder, or remove it.")
    if loaded.source_path is None:
        raise ModelLoadError(f"The files of {loaded.id!r} are not to be found on this machine.")
    source = SourceFolder(loaded.source_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = ProgressFolder(target.with_name(target.name + ".progress"))
    try:
        facts = {
            "id": loaded.id,
            "model": source.digest,
            "dtype": str(loaded.dtype),
            "text": text_name,
            **_flat(asdict(settings)),
        }
        n_done = folder.begin(facts)
        words = folder.text()
        if words is None:
            words = text()
            folder.keep_text(words)
        measured = measure or Measure(words.held, f"{words.origin}, those left out")
        model = loaded.model
        before = after = None
        if is_measured:
            before = nll(model, measured.rows, progress=_stage(progress, "Measuring the original"))
        begun = begin_walk(model, words.ids, settings)
        for name in begun.precisions:
            source.named(f"{name}.weight")  # refuses now what could not be written later
        n_in_layers = sum(p.numel() for layer in begun.runs.layers for p in layer.parameters())
        if settings.mixed is not None:
            found = sensitivities(
                begun.runs, begun.fmt, progress=_stage(progress, "Measuring sensitivity")
            )
            raised = raise_precision(found, begun.precisions, bits=settings.mixed)
            begun = Walk(begun.runs, begun.fmt, raised, settings)
        linears: list[LinearReport] = []
        kept: dict[str, str] = {}
        balanced: dict[str, float] = {}
        n_layers = 0
        for result in walk(begun, folder, n_done=n_done, progress=progress):
            linears += linear_reports([result])
            kept |= {f"{result.name}.{name}": why for name, why in result.kept.items()}
            balanced |= {f"{result.name}.{n}": exponent for n, exponent in result.exponents.items()}
            n_layers += 1
        if is_measured:
            after = nll(model, measured.rows, progress=_stage(progress, "Measuring the result"))
        n_weights = sum(linear.n_weights for linear in linears)
        report = QuantizationReport(
            scheme=settings.scheme,
            method=settings.method,
            calibration=words.origin if settings.needs_calibration else None,
            bits=sum(linear.bits * linear.n_weights for linear in linears) / max(1, n_weights),
            n_quantized=len(linears),
            n_kept=len(kept),
            coverage=n_weights / n_in_layers,
            kept=kept,
            balanced=balanced,
            bytes_before=_weights_bytes(source.path),
            bytes_after=0,
            nll_before=before,
            nll_after=after,
            measured_on=measured.name if is_measured else None,
            linears=tuple(linears),
        )
        done = _write(source, target, folder, model, n_layers, settings, report, progress, facts)
    finally:
        folder.close()
    folder.remove()
    return done


def _write(
    source: SourceFolder,
    target: Path,
    folder: ProgressFolder,
    model: Any,
    n_layers: int,
    settings: QuantizeSettings,
    report: QuantizationReport,
    progress: Progress | None,
    facts: dict[str, Any],
) -> QuantizationReport:
    """Write the folder: a part a layer, and the tensors that nothing was done to."""
    writer = QuantizedFolderWriter(target, job=facts)
    replaced: set[str] = set()
    for i in range(n_layers):
        result = folder.layer(i)
        part = f"layer-{i:05d}"
        names = {name: _checkpoint_name(source, result, name) for name in result.linears}
        changed = {
            source.named(f"{result.name}.{name}"): value for name, value in result.changed.items()
        }
        replaced |= {f"{name}.weight" for name in names.values()} | set(changed)
        if part not in writer.parts and (names or changed):
            writer.write(
                part,
                matrices={names[n]: quantized.matrix for n, quantized in result.linears.items()},
                tensors=changed,
                low_rank={
                    names[n]: quantized.factors
                    for n, quantized in result.linears.items()
                    if quantized.factors is not None
                },
            )
        if progress is not None:
            progress("Writing", i + 1, n_layers)
    for i, shard in enumerate(source.shards(without=replaced, most_bytes=_SHARD_BYTES)):
        part = f"rest-{i:05d}"
        if part not in writer.parts:
            # What was loaded in half precision is served in it; a float32 source need not be kept.
            tensors = {
                n: t.to(model.dtype) if t.dtype == torch.float32 else t for n, t in shard.items()
            }
            writer.write(part, matrices={}, tensors=tensors)
    quantized_names = {lr.name for lr in report.linears}
    ignore = [
        _module_name(source, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in quantized_names
    ]
    size = sum(path.stat().st_size for path in writer.partial.glob("*.safetensors"))
    report = replace(report, bytes_after=size)
    writer.finish(
        source.path,
        QuantizationFacts(
            scheme=settings.scheme,
            activations=settings.activations,
            method=settings.method,
            lorc_rank=settings.lorc,
            trimtab_version=version("trimtab"),
            source={"id": facts["id"], "digest": facts["model"]},
            report=report.summary(),
        ),
        ignore=ignore,
    )
    return report


def _checkpoint_name(source: SourceFolder, result: LayerResult, name: str) -> str:
    return source.named(f"{result.name}.{name}.weight").removesuffix(".weight")


def _module_name(source: SourceFolder, name: str) -> str:
    """Return a kept linear's name in the checkpoint; one that is tied to another has its own."""
    try:
        return source.named(f"{name}.weight").removesuffix(".weight")
    except ModelLoadError:
        return name


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with every value as JSON gives it back, so that they can be compared."""
    return {
        k: [list(pair) for pair in v] if isinstance(v, tuple) else v for k, v in settings.items()
    }


def _weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))

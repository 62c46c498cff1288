"""`trimtab quantize`: four-bit weights in a folder that both engines serve."""

from __future__ import annotations

import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.steering.errors import DataError
from trimtab.training.quantization.schemes import DEFAULT_METHOD, METHODS, SCHEMES
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, loading_options
from trimtab.ui.terminal import next_steps, out, out_json, say, stages, table

if TYPE_CHECKING:
    from trimtab.steering.model.loading import LoadedModel
    from trimtab.training.quantization.build import Measure
    from trimtab.training.quantization.calibration_text import CalibrationText
    from trimtab.training.quantization.report import QuantizationReport

_WORST = 5
_FEW_ROWS = 16
# Not "auto": its measurement may fall out differently when an interrupted run is taken up again.
_loading_options = partial(loading_options, dtype="bfloat16")


def keeps(
    ctx: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Return a repeated PATTERN=PRECISION option as pairs."""
    pairs = []
    for text in given:
        pattern, equals, precision = text.partition("=")
        if not (equals and pattern):
            raise click.BadParameter(f"{text!r} is not PATTERN=fp8 or PATTERN=bf16.")
        pairs.append((pattern, precision))
    return tuple(pairs)


@click.command(
    "quantize",
    cls=HelpfulCommand,
    examples=(
        "trimtab quantize smollm2 --out smollm2-nvfp4",
        "trimtab quantize smollm2 --scheme w4a8 --out smollm2-w4a8",
        "trimtab quantize my_model --scheme int4 --calibration notes.txt --out my_model-int4",
        "trimtab quantize smollm2 --keep down_proj=fp8 --lorc 16 --out smollm2-careful",
    ),
)
@click.argument("model")
@click.option(
    "--out",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where to write the quantised model; it must not exist.",
)
@click.option(
    "--scheme",
    type=click.Choice(list(SCHEMES)),
    default="nvfp4",
    show_default=True,
    help="What is stored, and for w4a8 what is computed with.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default=DEFAULT_METHOD,
    show_default=True,
    help="How weights are rounded; rtn is the quickest, awq+gptq the slowest.",
)
@click.option("--group-size", type=click.IntRange(1), help="Weights that share a scale (int4).")
@click.option(
    "--lorc",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="RANK",
    help="Add a low-rank correction beside each matrix.",
)
@click.option(
    "--keep",
    multiple=True,
    callback=keeps,
    metavar="PATTERN=PRECISION",
    help="Keep linears whose name ends so in fp8 or bf16; * stands for anything. Repeatable.",
)
@click.option(
    "--mixed",
    type=click.FloatRange(4, 8.5),
    metavar="BITS",
    help="Spend so many bits a weight: the most sensitive linears get FP8.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to calibrate on.  [default: bundled, and the model's own]",
)
@click.option("--rows", default=64, show_default=True, type=click.IntRange(2), help="Rows of text.")
@click.option(
    "--tokens",
    default=512,
    show_default=True,
    type=click.IntRange(16),
    help="Tokens of a row.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Of the text and its rows.")
@click.option(
    "--measure",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to measure perplexity on.  [default: calibration rows that are left out]",
)
@json_option
@_loading_options
def quantize(
    model: str,
    target: Path,
    scheme: str,
    method: str,
    group_size: int | None,
    lorc: int,
    keep: tuple[tuple[str, str], ...],
    mixed: float | None,
    calibration: Path | None,
    rows: int,
    tokens: int,
    seed: int,
    measure: Path | None,
    as_json: bool,
    device: str,
    dtype: str,
) -> None:
    """Quantise a model's decoder layers to four bits.

    Layer by layer: only the model, one layer's statistics and the calibration text's hidden states
    are in memory. Interrupted, even by kill -9, the same command goes on with the layer it was at.
    Embeddings, norms and the output layer stay as they are. The folder is in compressed-tensors'
    layout, which vLLM and transformers load too.
    """
    from trimtab.training.quantization.settings import QuantizeSettings

    settings = QuantizeSettings(
        scheme=scheme, method=method, group_size=group_size, lorc=lorc, keep=keep, mixed=mixed
    )
    if not settings.needs_calibration:
        rows = min(rows, _FEW_ROWS)  # they are measured on only
    # All that can be refused is refused before the model is loaded.
    for path in (calibration, measure):
        if path is not None and not path.is_file():
            raise DataError(f"There is no file {str(path)!r}.")
    if target.exists():
        raise DataError(f"{str(target)!r} exists already; give another folder, or remove it.")

    from trimtab.steering.model.loading import load_model
    from trimtab.training.quantization.build import quantize_model
    from trimtab.ui.server_log import quiet_start

    quiet_start()
    began = time.perf_counter()
    with stages() as stage:
        stage(f"Loading {model}")
        loaded = load_model(model, device=device, dtype=dtype)
        text_name = f"default text, seed {seed}, {rows} rows of {tokens}"
        if calibration is not None:
            from trimtab.steering.model.manifest import sha256_of

            text_name = f"{sha256_of(calibration)}, seed {seed}, {rows} rows of {tokens}"

        def text() -> CalibrationText:
            return _text(loaded, calibration, rows=rows, tokens=tokens, seed=seed, stage=stage)

        report = quantize_model(
            loaded,
            target,
            settings,
            text=text,
            text_name=text_name,
            measure=_measure(loaded, measure, tokens),
            progress=lambda name, done, total: stage(name, done, total),
        )
    seconds = time.perf_counter() - began
    if as_json:
        out_json(report.to_json() | {"folder": str(target), "seconds": round(seconds, 1)})
    else:
        _show(report)
    say(f"Wrote {target} in {seconds:.0f} s. Time spent: {stage.spent()}.")
    next_steps(f"trimtab serve {shlex.quote(str(target))}")


def _text(
    loaded: LoadedModel,
    calibration: Path | None,
    *,
    rows: int,
    tokens: int,
    seed: int,
    stage: Any,
) -> CalibrationText:
    from trimtab.training.quantization.calibration_text import default_text, text_from_file

    if calibration is not None:
        return text_from_file(
            calibration, loaded.tokenizer, n_rows=rows, n_tokens=tokens, seed=seed
        )
    return default_text(
        loaded.model,
        loaded.tokenizer,
        n_rows=rows,
        n_tokens=tokens,
        seed=seed,
        progress=lambda done, total: stage("Writing calibration text", done, total),
    )


def _measure(loaded: LoadedModel, path: Path | None, tokens: int) -> Measure | None:
    if path is None:
        return None
    from trimtab.training.quantization.build import Measure
    from trimtab.training.quantization.calibration_text import tokens_of
    from trimtab.training.quantization.perplexity import windows

    ids = tokens_of(path, loaded.tokenizer)
    if len(ids) < tokens:
        raise DataError(
            f"{str(path)!r} has {len(ids)} tokens; perplexity takes rows of {tokens}. "
            "Give a longer text, or fewer --tokens."
        )
    return Measure(windows(ids, n_windows=None, n_tokens=tokens), path.name)


def _show(report: QuantizationReport) -> None:
    """Print what came of it: the whole, and the linears that lost most."""
    saved = report.bytes_before / max(1, report.bytes_after)
    lines = [
        ("scheme, method", f"{report.scheme}, {report.method}"),
        (
            "bits a weight",
            f"{report.bits:.2f}, in {report.n_quantized} linears, "
            f"{report.coverage:.1%} of the layers' weights",
        ),
        (
            "weights",
            f"{_mb(report.bytes_before)} -> {_mb(report.bytes_after)}, {saved:.1f}x smaller",
        ),
    ]
    if report.calibration:
        lines.append(("calibrated on", report.calibration))
    if report.nll_before is not None and report.nll_after is not None:
        lines.append(
            (
                "perplexity",
                f"{report.perplexity_before:.2f} -> {report.perplexity_after:.2f} "
                f"({report.nll_after - report.nll_before:+.3f} nats a token) on "
                f"{report.measured_on}",
            )
        )
    size = max(len(name) for name, _ in lines)
    for name, value in lines:
        out(f"{name.ljust(size)}  {value}")
    measured = [linear for linear in report.linears if linear.output_error is not None]
    if measured:
        measured.sort(key=lambda linear: linear.output_error or 0.0, reverse=True)
        out()
        out(
            table(
                ("output error", "weight error", "bits", "linears that lost most"),
                [(w.output_error, w.weight_error, w.bits, w.name) for w in measured[:_WORST]],
            )
        )
    by_reason: dict[str, list[str]] = {}
    for name, why in report.kept.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        say(f"Kept {len(names)} as they are, because {why}: {', '.join(names[:3])} ...")


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"

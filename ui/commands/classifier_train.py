"""`trimtab classifiers train` and `eval`: make a classifier of labelled texts, and measure one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from trimtab.steering.errors import DataError
from trimtab.ui.commands.artifact_files import CLASSIFIER, check_is_free, model_flag
from trimtab.ui.commands.classifier_look import confusion_table, scores_table, summary
from trimtab.ui.example_source import example_options, read_examples
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, loading_options, model_option
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import Stages, next_steps, out, out_json, say, stages

if TYPE_CHECKING:
    from trimtab.training.classifiers.states import Position
    from trimtab.training.steered_model import SteeredModel

POSITIONS = ("last", "answer", "both")


def _layers(
    ctx: click.Context, option: click.Parameter, given: str | None
) -> tuple[int, ...] | None:
    """Return layers from `10,15`."""
    if given is None:
        return None
    try:
        return tuple(sorted({int(text) for text in given.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{given!r} is not layer numbers with commas between.") from None


def _layers_option(text: str) -> Any:
    return click.option("--layers", metavar="N,N", callback=_layers, help=text)


@click.command(
    "train",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers train --bundled tone --own-answers 48 --id tone",
        "trimtab classifiers train --texts tones.jsonl --id tone",
        "trimtab classifiers train --instructions styles.json --questions asked.jsonl --id style "
        "--own-answers 48",
        "trimtab classifiers train --log log.jsonl --label-from metadata.rating --id liked "
        "--kind linear",
    ),
)
@example_options
@click.option("--id", "classifier_id", required=True, help="Name of the classifier.")
@_layers_option("Layers to train at.  [default: eight, from 25 to 95 % of the depth]")
@click.option(
    "--kind",
    type=click.Choice(["mlp", "linear"]),
    default="mlp",
    show_default=True,
    help="Two hidden layers, or none.",
)
@click.option(
    "--hidden",
    default=128,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Units of each hidden layer.",
)
@click.option("--multi-label", is_flag=True, help="A text may have any number of labels.")
@click.option(
    "--position",
    type=click.Choice(POSITIONS),
    help="Tokens to read: a text's last, its answer's, or those and the one before.  [default: "
    "answer; last for prompts without one]",
)
@click.option(
    "--own-answers",
    "n_answer_tokens",
    type=click.IntRange(1, 512),
    metavar="TOKENS",
    help="With --bundled or --instructions: let the model answer under each, in so many tokens, "
    "and read the answers behind the bare questions.",
)
@click.option("--seed", default=0, show_default=True, help="Of the split and the weights.")
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    show_default=True,
    help="Find how far each label may be steered; takes most of the time.",
)
@click.option("--description", default="", metavar="TEXT", help="A sentence for people.")
@click.option("--overwrite", is_flag=True, help="Replace a classifier of the same id.")
@model_option
@loading_options
def train(
    bundled: str | None,
    texts: Path | None,
    instructions: Path | None,
    questions: Path | None,
    log: Path | None,
    label_from: str | None,
    classifier_id: str,
    layers: tuple[int, ...] | None,
    kind: str,
    hidden: int,
    multi_label: bool,
    position: str | None,
    n_answer_tokens: int | None,
    seed: int,
    calibrate: bool,
    description: str,
    overwrite: bool,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Train a classifier of the model's hidden states on labelled texts, measure and store it.

    Give one of --bundled, --texts, --instructions with --questions, or --log with --label-from. A
    fifth of the questions is kept for measuring, unless the texts say which.
    """
    # All that can be refused is refused before the model is loaded.
    store = store_of(model)
    check_is_free(CLASSIFIER, store, classifier_id, overwrite=overwrite)
    data = read_examples(bundled, texts, instructions, questions, log, label_from)
    if n_answer_tokens is not None and instructions is None and bundled is None:
        raise click.UsageError("--own-answers goes with --bundled, or --instructions.")
    has_answers = n_answer_tokens is not None or all(e.answer for e in data.examples)
    position = position or ("answer" if has_answers else "last")
    needs_answers = position != "last" and n_answer_tokens is None
    data.check(is_exclusive=not multi_label, needs_answers=needs_answers)
    data.split(seed=seed)

    began = time.perf_counter()
    with stages() as stage:

        def progress(name: str, done: int, total: int) -> None:
            stage(name.capitalize(), done, total)

        host = loaded_model(stage, model, device=device, dtype=dtype)
        from trimtab.training.classifiers.build import build_classifier

        if n_answer_tokens is not None:
            from trimtab.training.classifiers.own_answers import own_answers

            data = own_answers(
                host,
                data,
                n_tokens=n_answer_tokens,
                progress=lambda done, total: stage("Answering", done, total),
            )
        classifier = build_classifier(
            host,
            data,
            id=classifier_id,
            layers=layers,
            kind="mlp" if kind == "mlp" else "linear",
            is_exclusive=not multi_label,
            hidden=hidden,
            position=cast("Position", position),
            seed=seed,
            description=description,
            progress=progress,
        )
        if calibrate:
            from trimtab.training.classifiers.doses import calibrate_doses

            store.put_classifier(classifier)
            try:
                classifier = calibrate_doses(host, classifier, progress=progress)
            except DataError as error:
                raise DataError(
                    f"{classifier_id} is trained and stored, but not calibrated: {error}"
                ) from None
    store.put_classifier(classifier)
    seconds = time.perf_counter() - began
    counts = [classifier.data[f"n_{side}"] for side in ("fit", "validation", "held")]
    say(
        f"Trained {classifier_id} on {counts[0]} texts and {counts[1]} to validate in "
        f"{seconds:.0f} s; measured on {counts[2]}: {summary(classifier)}."
    )
    say(f"Time spent: {stage.spent()}.")
    next_steps(f"trimtab classifiers show {classifier_id}{model_flag(model)}")


def loaded_model(stage: Stages, model: str, *, device: str, dtype: str) -> SteeredModel:
    """Return a model to read."""
    from trimtab.steering.model.loading import load_model
    from trimtab.steering.model.profile import profile_model
    from trimtab.training.steered_model import SteeredModel
    from trimtab.ui.server_log import quiet_start

    quiet_start()
    stage(f"Loading {model}")
    loaded = load_model(model, device=device, dtype=dtype)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    return SteeredModel(loaded, profile)


@click.command(
    "eval",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers eval tone --texts other_tones.jsonl",
        "trimtab classifiers eval liked --log log.jsonl --label-from metadata.rating --json",
    ),
)
@click.argument("classifier_id", metavar="ID")
@example_options
@_layers_option("Layers to measure.  [default: all it has]")
@click.option(
    "--position",
    type=click.Choice(POSITIONS),
    help="Tokens to read.  [default: those it was trained on]",
)
@model_option
@loading_options
@json_option
def eval_(
    classifier_id: str,
    bundled: str | None,
    texts: Path | None,
    instructions: Path | None,
    questions: Path | None,
    log: Path | None,
    label_from: str | None,
    layers: tuple[int, ...] | None,
    position: str | None,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure a classifier on other labelled texts.

    Of texts that are marked as held, or that it was trained on, only those kept for measuring are
    used.
    """
    classifier = store_of(model).classifier(classifier_id)
    data = read_examples(bundled, texts, instructions, questions, log, label_from)
    from trimtab.training.classifiers.evaluate import check_fits, measure_classifier

    check_fits(classifier, data, layers=layers)
    with stages() as stage:
        host = loaded_model(stage, model, device=device, dtype=dtype)
        found = measure_classifier(
            host,
            classifier,
            data,
            layers=layers,
            position=cast("Position | None", position),
            progress=lambda name, done, total: stage(name.capitalize(), done, total),
        )
    if as_json:
        out_json({"id": classifier_id, "data": data.name, "layers": found})
        return
    shown = classifier.probe_layer
    if str(shown) not in found:
        shown = int(next(iter(found)))
    out(scores_table(found, default=classifier.default_layers))
    out()
    out(confusion_table(found[str(shown)], classifier.labels, layer=shown))
    next_steps(f"trimtab classifiers show {classifier_id}{model_flag(model)}")

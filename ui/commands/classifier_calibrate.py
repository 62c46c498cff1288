"""`trimtab classifiers calibrate`: find how far a classifier may steer before text falls apart."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from trimtab.steering.errors import DataError
from trimtab.ui.commands.artifact_files import model_flag
from trimtab.ui.commands.classifier_train import loaded_model
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import loading_options, model_option
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import next_steps, say, stages

if TYPE_CHECKING:
    from trimtab.steering.classifier import ClassifierArtifact
    from trimtab.training.classifiers.doses import LabelSet


@click.command(
    "calibrate",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers calibrate tone",
        "trimtab classifiers calibrate tone --labels casual,empathetic --labels casual,-expert",
    ),
)
@click.argument("classifier_id", metavar="ID")
@click.option(
    "--labels",
    "given",
    multiple=True,
    metavar="A,B,-C",
    help="A label set: toward A and B, away from C; `-rival` avoids the likeliest other label; "
    "repeatable.  [default: each label sought, avoided and reflected]",
)
@click.option("--pairs", is_flag=True, help="Each pair of labels as well.")
@click.option(
    "--prompts",
    "n_prompts",
    default=40,
    show_default=True,
    type=click.IntRange(20, 64),
    help="Neutral questions answered at every dose.",
)
@model_option
@loading_options
def calibrate(
    classifier_id: str,
    given: tuple[str, ...],
    pairs: bool,
    n_prompts: int,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Find the largest dose of each label set at which the model still speaks, and store it.

    At a dose, neutral questions are answered; at most 5 % of the answers may fall apart. Requests
    over the dose found are refused unless they say `over_dose`.
    """
    store = store_of(model)
    classifier = store.classifier(classifier_id)
    wanted = [_label_set(text, classifier) for text in given]

    from trimtab.training.classifiers.doses import (
        DoseBudget,
        calibrate_doses,
        default_label_sets,
    )

    if not wanted:
        wanted = default_label_sets(classifier.labels, with_pairs=pairs)
    elif pairs:
        raise click.UsageError("--pairs adds to the default label sets; leave --labels out.")
    began = time.perf_counter()
    with stages() as stage:
        host = loaded_model(stage, model, device=device, dtype=dtype)
        classifier = calibrate_doses(
            host,
            classifier,
            label_sets=wanted,
            budget=DoseBudget(n_prompts=n_prompts),
            progress=lambda name, done, total: stage(name.capitalize(), done, total),
        )
    store.put_classifier(classifier)
    say(
        f"Calibrated {len(wanted)} label sets of {classifier_id} in "
        f"{time.perf_counter() - began:.0f} s."
    )
    next_steps(f"trimtab classifiers show {classifier_id}{model_flag(model)}")


def _label_set(text: str, classifier: ClassifierArtifact) -> LabelSet:
    """Return the label set of `casual,-expert`.

    Raises:
        DataError: a label the classifier does not have, or none at all.
    """
    from trimtab.training.classifiers.doses import LabelSet

    words = [word.strip() for word in text.split(",")]
    avoid = [word[1:] for word in words if word.startswith("-")]
    target = [word for word in words if word and not word.startswith("-")]
    has_rival = "rival" in avoid and "rival" not in classifier.labels
    if has_rival:
        avoid.remove("rival")
    for label in (*target, *avoid):
        if label not in classifier.labels:
            raise DataError(
                f"--labels {text!r}: classifier {classifier.id!r} has no label {label!r}; it has "
                f"{', '.join(classifier.labels)}."
            )
    if not target and not avoid and not has_rival:
        raise DataError(f"--labels {text!r} names no label.")
    return LabelSet(tuple(target), tuple(avoid), picks_rival=has_rival)

"""`trimtab classifiers list` and `show`: what there is, and how well it reads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from trimtab.ui.commands.artifact_files import CLASSIFIER, model_flag, say_problems
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, model_option
from trimtab.ui.receipt_line import spans
from trimtab.ui.stores import model_id, store_of
from trimtab.ui.terminal import next_steps, out, out_json, say, styled, table

if TYPE_CHECKING:
    from trimtab.steering.classifier import ClassifierArtifact

_TRAIN = "trimtab classifiers train --texts tones.jsonl --id tone"


@click.command(
    "list",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers list",
        "trimtab classifiers list --model smollm2 --json",
    ),
)
@click.option("--model", metavar="MODEL", help="Only this model's.  [default: every model's]")
@json_option
def list_(model: str | None, as_json: bool) -> None:
    """List the stored classifiers, and the files that cannot be read."""
    found, problems = CLASSIFIER.found(model)
    if as_json:
        out_json({"classifiers": [one.card() for one in found], "problems": problems})
        return
    if found:
        header = ("classifier", "model", "labels", "layer", "held-out", "description")
        out(table(header, [_row(one) for one in found]))
    say_problems(problems)
    if not found:
        say(f"No classifiers {f'for {model_id(model)} ' if model else ''}yet.")
        next_steps(_TRAIN)
        return
    option = f" --model {shlex.quote(model)}" if model else ""
    next_steps(f"trimtab classifiers show {found[0].id}{option}")


def _row(classifier: ClassifierArtifact) -> tuple[str, ...]:
    labels = ", ".join(classifier.labels)
    return (
        classifier.id,
        classifier.model.id,
        labels if len(labels) <= 40 else f"{len(classifier.labels)} labels",
        spans(classifier.default_layers).split(" ", 1)[1],
        _accuracy(_scores(classifier)),
        classifier.description,
    )


@click.command(
    "show",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers show tone",
        "trimtab classifiers show tone --json",
    ),
)
@click.argument("classifier_id", metavar="ID")
@model_option
@json_option
def show(classifier_id: str, model: str, as_json: bool) -> None:
    """Show what a classifier tells apart, how well at each layer, and how far it may steer."""
    classifier = store_of(model).classifier(classifier_id)
    if as_json:
        out_json(classifier.card())
        return
    text = f": {classifier.description}" if classifier.description else ""
    out(styled(classifier.id, "bold") + text)
    for name, value in _facts(classifier).items():
        out(f"  {name:<14} {value}")
    measured = _measured(classifier)
    if measured:
        out()
        out(measured)
    if classifier.doses:
        out()
        out(doses_table(classifier))
    else:
        say("No calibrated doses: steering by it needs a dose of your own.")
    next_steps(f"trimtab classifiers eval {classifier_id} --texts FILE{model_flag(model)}")


def _measured(classifier: ClassifierArtifact) -> str | None:
    """Return the tables of measures, or None once it is said why there are none."""
    if not classifier.metrics:
        say("Not measured: the file says nothing of how well it reads.")
        return None
    layer = classifier.probe_layer
    try:
        tables = [scores_table(classifier.metrics, default=classifier.default_layers)]
        if str(layer) in classifier.metrics:
            scores = classifier.metrics[str(layer)]
            tables.append(confusion_table(scores, classifier.labels, layer=layer))
    # Measures are plain JSON that an imported file may fill with anything.
    except (TypeError, ValueError, KeyError, AttributeError):
        say("Its measures are not of trimtab's form; --json shows them. Measure it with `eval`.")
        return None
    return "\n\n".join(tables)


def _facts(classifier: ClassifierArtifact) -> dict[str, str]:
    settings, data = classifier.settings, classifier.data
    hidden = classifier.card()["hidden_units"]
    rows = [f"{data[f'n_{side}']} {side}" for side in ("fit", "validation", "held") if _has(data)]
    left_out = data.get("skipped")
    skipped = left_out if isinstance(left_out, dict) else {}
    facts = {
        "model": f"{classifier.model.id} ({classifier.model.model_type}, "
        f"width {classifier.model.hidden_size})",
        "measured on": classifier.model.weights,
        "labels": ", ".join(classifier.labels),
        "of a text": "one label" if classifier.is_exclusive else "any number of labels",
        "network": f"{' and '.join(map(str, hidden))} hidden units" if hidden else "linear",
        "reads": f"position {settings['position']}" if "position" in settings else "",
        "read at": f"layer {classifier.probe_layer} by probes",
        "guides at": f"{spans(classifier.default_layers)} by default",
        "has": spans(classifier.layers),
        "data": ", ".join([str(data.get("name", "")), *rows]).strip(", "),
        "left out": ", ".join(f"{n} with {reason}" for reason, n in skipped.items()),
        "created": f"{classifier.created} by trimtab {classifier.trimtab_version}".strip(),
        "digest": classifier.digest[:16],
    }
    return {name: value for name, value in facts.items() if value}


def _has(data: Mapping[str, Any]) -> bool:
    return all(f"n_{side}" in data for side in ("fit", "validation", "held"))


def _scores(classifier: ClassifierArtifact) -> dict[str, Any]:
    found = classifier.metrics.get(str(classifier.probe_layer))
    return found if isinstance(found, dict) else {}


def _accuracy(scores: Mapping[str, Any]) -> str:
    accuracy = scores.get("accuracy")
    return f"{accuracy:.0%}" if isinstance(accuracy, float) else "-"


def summary(classifier: ClassifierArtifact) -> str:
    """Return the default layer's measures in a few words."""
    scores = _scores(classifier)
    return (
        f"{_accuracy(scores)} right at {spans(classifier.default_layers)} "
        f"(calibration error {scores['ece']:.3f})"
    )


def scores_table(metrics: Mapping[str, Any], *, default: Sequence[int]) -> str:
    """Return measures a layer as a table; `*` marks the default layers.

    Args:
        metrics: layer as text -> its measures; what a file leaves out is shown as `-`.
        default: layers that are used when a request names none.
    """
    rows = []
    for layer in sorted(metrics, key=int):
        scores = metrics[layer]
        known = [x for x in scores.get("auroc", {}).values() if x is not None]
        rows.append(
            (
                f"{layer}{'*' if int(layer) in default else ''}",
                scores.get("n"),
                *(scores.get(key) for key in ("accuracy", "macro_f1")),
                sum(known) / len(known) if known else None,
                *(scores.get(key) for key in ("ece", "log_loss")),
            )
        )
    header = ("layer", "rows", "accuracy", "macro F1", "AUROC", "ECE", "log loss")
    return table(header, rows)


def confusion_table(scores: Mapping[str, Any], labels: Sequence[str], *, layer: int) -> str:
    """Return which label was read for which, or how often each was read rightly.

    Args:
        scores: a layer's measures.
        labels: in the order of the logits.
        layer: which one, for the table's head.
    """
    auroc = scores.get("auroc", {})
    if "confusion" in scores:
        rows = [
            (label, auroc.get(label), *row)
            for label, row in zip(labels, scores["confusion"], strict=True)
        ]
        return table((f"truth at layer {layer}", "AUROC", *labels), rows)
    counts = scores.get("counts", {})
    kinds = ("tp", "fp", "fn", "tn")
    rows = [
        (label, auroc.get(label), *(counts.get(label, {}).get(kind) for kind in kinds))
        for label in labels
    ]
    head = (f"label at layer {layer}", "AUROC", "found", "false", "missed", "rightly not")
    return table(head, rows)


def doses_table(classifier: ClassifierArtifact) -> str:
    """Return the calibrated doses: how far each label set may be steered."""
    rows = [
        (
            ", ".join(entry.target) or "-",
            ", ".join([*entry.avoid, *(["likeliest other"] if entry.picks_rival else [])]) or "-",
            "reflection" if entry.is_reflection else "steps",
            entry.dose,
        )
        for entry in classifier.doses
    ]
    return table(("toward", "away from", "by", "dose"), rows)

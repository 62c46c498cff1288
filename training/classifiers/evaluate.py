"""Measure a stored classifier on labelled texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.kernels import probabilities, read
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.errors import DataError, listed
from trimtab.steering.lookup import check_belongs
from trimtab.training.calibration import Progress
from trimtab.training.classifiers.examples import ExampleSet, answers_of, targets_of
from trimtab.training.classifiers.metrics import measures
from trimtab.training.classifiers.states import Position, each_layer, tokens_read
from trimtab.training.steered_model import SteeredModel


def measure_classifier(
    host: SteeredModel,
    classifier: ClassifierArtifact,
    data: ExampleSet,
    *,
    layers: Sequence[int] | None = None,
    position: Position | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return measures of a stored classifier on labelled texts, a layer each.

    Texts that are kept for measuring are the only ones used, if there are any: those the data
    marks as held and, of the very data it was trained on, those that training held.

    Args:
        host: the model it belongs to.
        classifier: what to measure.
        data: texts with labels it knows.
        layers: of those it has; None takes all.
        position: which tokens to read; None takes those it was trained on.
        progress: told of the texts done.

    Returns:
        layer as text -> `measures`.

    Raises:
        DataError: a label or layer it does not have, or a text too long.
        SpecError: it reads another model.
    """
    check_belongs(
        classifier.model, host.profile.ref, name=classifier.id, param=None, what="classifier"
    )
    check_fits(classifier, data, layers=layers)
    wanted = classifier.layers if layers is None else tuple(sorted(set(layers)))
    data = _held(data, classifier)
    if position is None:
        position = classifier.settings.get("position", "last")
    answers = answers_of(host, data)
    places = [tokens_read(answer, position) for answer in answers]
    targets = targets_of(data, classifier.labels)
    found = {}
    for layer, states, owner in each_layer(host, answers, places, wanted, progress=progress):
        network = classifier.at(layer)
        found[str(layer)] = measures(
            probabilities(read(states, network), network),
            targets[owner],
            labels=classifier.labels,
            is_exclusive=classifier.is_exclusive,
        )
    return found


def check_fits(
    classifier: ClassifierArtifact, data: ExampleSet, *, layers: Sequence[int] | None = None
) -> None:
    """Refuse texts, or layers, that a classifier cannot be measured on.

    Raises:
        DataError: a label or layer it does not have, or another number of labels on a text.
    """
    if layers is not None and not (layers and set(layers) <= set(classifier.layers)):
        raise DataError(
            f"Classifier {classifier.id!r} reads layers {list(classifier.layers)}, "
            f"not {list(layers)}."
        )
    unknown = set(data.labels) - set(classifier.labels)
    if unknown:
        raise DataError(
            f"{data.name} has labels {listed(unknown)}, which classifier {classifier.id!r} does "
            f"not know; it knows {listed(classifier.labels)}."
        )
    for example in data.examples:
        if classifier.is_exclusive and len(example.labels) != 1:
            raise DataError(
                f"{example.where or data.name} has {len(example.labels)} labels; the classifier "
                f"{classifier.id!r} gives each text one."
            )


def _held(data: ExampleSet, classifier: ClassifierArtifact) -> ExampleSet:
    if data.sha256 == classifier.data.get("sha256"):
        rows: Sequence[int] = data.split(seed=classifier.settings["seed"]).held
    else:
        rows = [i for i, example in enumerate(data.examples) if example.is_held]
    if not rows:
        return data
    return ExampleSet(data.name, tuple(data.examples[i] for i in rows), data.skipped)

"""From labelled texts to a stored classifier: states, one network a layer, the best layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from trimtab.kernels import Classifier, probabilities, read
from trimtab.steering.artifact import MAX_ARTIFACT_BYTES
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.errors import DataError
from trimtab.training.calibration import Progress
from trimtab.training.classifiers.examples import ExampleSet, answers_of, targets_of
from trimtab.training.classifiers.fit import Fitted, Kind, Labelled, Recipe, fit_network
from trimtab.training.classifiers.metrics import measures
from trimtab.training.classifiers.states import Position, each_layer, tokens_read
from trimtab.training.steered_model import SteeredModel

_SWEEP = 8
_FIRST, _LAST = 0.25, 0.95  # of the depth: what was said is read late, but not at the very end
_TIE = 0.01  # nats; less is chance at the hundreds of rows there are
_USUAL_DEPTH = 0.5  # ToneBank on a 135M model: 40 to 60 % of the depth steer best (docs/LOG.md)
_N_GUIDED = 3
_TENSORS = (("w_in", "b_in"), ("w_mid", "b_mid"), ("w_out", "b_out"))


def build_classifier(
    host: SteeredModel,
    data: ExampleSet,
    *,
    id: str,
    layers: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
    kind: Kind = "mlp",
    is_exclusive: bool = True,
    hidden: int = 128,
    position: Position = "last",
    seed: int = 0,
    description: str = "",
    progress: Progress | None = None,
) -> ClassifierArtifact:
    """Train a classifier of hidden states.

    One network a layer learns from the rows to fit. The validation rows stop each, calibrate its
    probabilities and choose the layer that probes read; the held rows are only measured on.

    Args:
        host: the model.
        data: labelled texts.
        id: the classifier's name.
        layers: 0-based decoder layers to train at; None takes eight from 25 to 95 % of the depth.
        keep: which of them to keep; None keeps all.
        kind: `mlp` or `linear`.
        is_exclusive: one label a text, or any number of them.
        hidden: units of each hidden layer of an `mlp`.
        position: which tokens of a text to read.
        seed: of the split, the weights and the rows' order.
        description: a sentence for people.
        progress: told of each stage's steps.

    Raises:
        DataError: no such layer, texts too few or too long, or a network too large to store.

    Source: K-Steering, arXiv 2505.24535.
    Differs: layer l is the output of decoder block l when training as when steering; the published
        code trains on a block's input and steers its output.
    """
    n_layers = len(host.profile.layers)
    swept = trained_layers(layers, n_layers)
    kept = swept if keep is None else tuple(sorted(set(keep)))
    if not kept or not set(kept) <= set(swept):
        raise DataError(f"Layers to keep, {list(kept)}, are not among those to train, {swept}.")
    recipe = Recipe(kind=kind, is_exclusive=is_exclusive, hidden=hidden, seed=seed)
    data.check(is_exclusive=is_exclusive, needs_answers=position != "last")
    labels = data.labels
    check_size(recipe, host.profile.ref.hidden_size, n_labels=len(labels), n_layers=len(kept))
    split = data.split(seed=seed)
    answers = answers_of(host, data)
    places = [tokens_read(answer, position) for answer in answers]
    targets = targets_of(data, labels)
    trained: dict[int, Fitted] = {}
    metrics: dict[str, Any] = {}

    def training(done: int, total: int) -> None:
        if progress is not None:
            progress("training", len(trained) * total + done, len(swept) * total)

    for layer, states, owner in each_layer(host, answers, places, swept, progress=progress):
        fit, validation, held = (
            Labelled(states[rows], targets[owner[rows]])
            for rows in (
                torch.isin(owner, torch.tensor(side)).nonzero()[:, 0]
                for side in (split.fit, split.validation, split.held)
            )
        )
        fitted = fit_network(fit, validation, recipe, device=host.device, progress=training)
        trained[layer] = fitted
        metrics[str(layer)] = {
            **_measured(fitted, held, labels=labels, is_exclusive=is_exclusive),
            "validation_loss": round(fitted.validation_loss, 6),
            "n_epochs": fitted.n_epochs,
            "calibration": fitted.calibration,
        }
    return ClassifierArtifact(
        id=id,
        model=host.profile.ref,
        layers=kept,
        labels=labels,
        is_exclusive=is_exclusive,
        default_layers=guided_layers(kept, n_layers),
        probe_layer=best_layer({layer: trained[layer].validation_loss for layer in kept}, n_layers),
        settings={**asdict(recipe), "position": position},
        data={
            "name": data.name,
            "sha256": data.sha256,
            "n_fit": len(split.fit),
            "n_validation": len(split.validation),
            "n_held": len(split.held),
            "n_rows": sum(map(len, places)),
            "counts": data.counts,
            "skipped": data.skipped,
        },
        metrics=metrics,
        description=description,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trimtab_version=version("trimtab"),
        **_stacked([trained[layer] for layer in kept]),  # type: ignore[arg-type]
    )


def sweep(n_layers: int) -> tuple[int, ...]:
    """Return the layers that are tried when nobody names any."""
    share = (_LAST - _FIRST) / (_SWEEP - 1)
    return tuple(sorted({round((_FIRST + share * k) * (n_layers - 1)) for k in range(_SWEEP)}))


def best_layer(losses: Mapping[int, float], n_layers: int) -> int:
    """Return the layer to read: the lowest loss; of equally good ones the nearest to mid-depth.

    Styles that a prompt asks for are told apart at every layer (ToneBank on a 135M model: 60 of 60
    at eight layers), and the lowest of such losses says nothing about where to steer.

    Args:
        losses: validation loss by layer.
        n_layers: of the model.
    """
    lowest = min(losses.values())
    tied = [layer for layer, loss in losses.items() if loss <= lowest + _TIE]
    return min(tied, key=lambda layer: (abs(layer - _USUAL_DEPTH * (n_layers - 1)), layer))


def guided_layers(layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Return the layers to guide: the three nearest to mid-depth.

    Which layer tells texts apart best says nothing about where to steer. Three layers at a third of
    the dose each moved the judged tones further than one at equal damage.

    Args:
        layers: those that have a network.
        n_layers: of the model.
    """
    middle = _USUAL_DEPTH * (n_layers - 1)
    return tuple(sorted(sorted(layers, key=lambda n: (abs(n - middle), -n))[:_N_GUIDED]))


def trained_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """Return the layers to train at, ascending; those of `sweep` if none are named.

    Raises:
        DataError: the model has no such layer.
    """
    if layers is None:
        return sweep(n_layers)
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong or not layers:
        raise DataError(
            f"There is no layer {wrong}; the model has 0 to {n_layers - 1}.", param="layers"
        )
    return tuple(sorted(set(layers)))


def check_size(recipe: Recipe, d: int, *, n_labels: int, n_layers: int) -> None:
    """Refuse what could not be stored, before it is trained.

    Raises:
        DataError: it is larger than an artifact may be.
    """
    first = n_labels if recipe.kind == "linear" else recipe.hidden
    n_bytes = 4 * n_layers * first * (d + recipe.hidden + n_labels + 3)
    if n_bytes > MAX_ARTIFACT_BYTES:
        raise DataError(
            f"{n_layers} networks of {recipe.hidden} hidden units would take {n_bytes} bytes; a "
            f"classifier has at most {MAX_ARTIFACT_BYTES}. Train fewer layers or fewer units."
        )


def _measured(
    fitted: Fitted, held: Labelled, *, labels: Sequence[str], is_exclusive: bool
) -> dict[str, Any]:
    network = Classifier.of(fitted.layers, is_exclusive=is_exclusive)
    return measures(
        probabilities(read(held.states, network), network),
        held.targets,
        labels=labels,
        is_exclusive=is_exclusive,
    )


def _stacked(networks: Sequence[Fitted]) -> dict[str, torch.Tensor]:
    """Return the artifact's tensors from networks of one shape."""
    n = len(networks[0].layers)
    names = _TENSORS[:n]
    return {
        name: torch.stack([network.layers[i][part] for network in networks])
        for i, pair in enumerate(names)
        for part, name in enumerate(pair)
    }

"""Train one layer's network, and fold standardising and calibration into its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch.nn import functional

from trimtab.steering.classifier import MAX_WIDTH
from trimtab.steering.errors import DataError
from trimtab.training.classifiers.probability_calibration import calibrated

Kind = Literal["mlp", "linear"]
Layers = list[tuple[torch.Tensor, torch.Tensor]]

_FLOOR = 0.01  # of the median deviation: an input that never varied would be blown up without it


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        kind: `mlp`, two hidden ReLU layers, or `linear`.
        is_exclusive: one label a text (cross entropy) or any number of them (binary, each label).
        hidden: units of each hidden layer; of no effect on a linear one.
        learning_rate: AdamW's.
        weight_decay: AdamW's, on weights of standardised inputs.
        noise: deviation of Gaussian noise added to standardised inputs: a smoother classifier,
            whose gradient holds further from the states it has seen.
        scales_each: whether each input is divided by its own deviation, or all by their common
            one. Its own reads as well, but a gradient through it points where states hardly vary.
        batch: rows a step.
        max_epochs: at most this many passes over the rows.
        patience: passes without a better validation loss before it stops.
        least_gain: nats by which a loss must be lower to be better. Without one, labels that are
            easily told apart are trained on until nothing is left of the gradient of a softmax.
        seed: of the weights and of the rows' order.

    Source: K-Steering, arXiv 2505.24535; withmartian/k-steering@4255420 for width and rate.
    Differs: inputs are standardised, training stops early and probabilities are calibrated; the
        source trains a fixed number of epochs on raw states.
    """

    kind: Kind = "mlp"
    is_exclusive: bool = True
    hidden: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    noise: float = 2.0
    scales_each: bool = False
    batch: int = 64
    max_epochs: int = 100
    patience: int = 8
    least_gain: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "linear"):
            raise DataError(f"Kind {self.kind!r} is not known; use 'mlp' or 'linear'.")
        if not 1 <= self.hidden <= MAX_WIDTH:
            raise DataError(f"{self.hidden} hidden units are not allowed; 1 to {MAX_WIDTH} are.")
        if not 0 <= self.noise < float("inf"):
            raise DataError(f"Noise {self.noise} is not a deviation; 0 or more is.")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Inputs with their labels.

    Attributes:
        states: `[n, d]`, float32.
        targets: whether each has each label, `[n, n_labels]`, float32, 0 or 1.
    """

    states: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained network.

    Attributes:
        layers: (weight, bias) of its one or three linear layers, float32 on the CPU, reading raw
            hidden states, with calibrated logits.
        validation_loss: of the calibrated network, nats a text (exclusive) or a label.
        n_epochs: passes until the best weights.
        calibration: `{"temperature"}`, or `{"scale", "offset"}` a label.
    """

    layers: Layers
    validation_loss: float
    n_epochs: int
    calibration: dict[str, float | list[float]]


def fit_network(
    fit: Labelled,
    validation: Labelled,
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train on some rows, stop and calibrate on others.

    Args:
        fit: weights learn from these, and mean and deviation are theirs.
        validation: rows of other texts.
        recipe: how.
        device: where to train.
        progress: called with epochs done and at most to do.
    """
    mean, deviation = standardisation(fit.states, scales_each=recipe.scales_each)
    x, held_out = (((rows.states - mean) / deviation).to(device) for rows in (fit, validation))
    layers, n_epochs = _trained(
        Labelled(x, fit.targets.to(device)),
        Labelled(held_out, validation.targets.to(device)),
        recipe,
        progress=progress,
    )
    with torch.no_grad():
        logits = forward(layers, held_out).cpu()
    layers = [(weight.cpu(), bias.cpu()) for weight, bias in layers]
    scale, offset = calibrated(logits, validation.targets, is_exclusive=recipe.is_exclusive)
    loss = loss_of(logits * scale + offset, validation.targets, is_exclusive=recipe.is_exclusive)
    record: dict[str, float | list[float]] = (
        {"temperature": round(1 / float(scale[0]), 6)}
        if recipe.is_exclusive
        else {"scale": _rounded(scale), "offset": _rounded(offset)}
    )
    return Fitted(folded(layers, mean, deviation, scale, offset), float(loss), n_epochs, record)


def standardisation(
    states: torch.Tensor, *, scales_each: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of each input, `[d]` both, the latter above zero.

    Args:
        states: `[n, d]`.
        scales_each: whether deviations are each input's own, or the root mean square of all.
    """
    deviation, mean = torch.std_mean(states.double(), dim=0, correction=0)
    if not scales_each:
        deviation = deviation.square().mean().sqrt().expand_as(deviation)
    floor = (_FLOOR * deviation.median()).clamp_min(1e-12)
    return mean.float(), deviation.clamp_min(floor).float()


def folded(
    layers: Layers,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
) -> Layers:
    """Return layers that read raw states and give scaled logits: the same function.

        first:  W (h - mean) / deviation + b  =  (W / deviation) h + (b - W mean / deviation)
        last:   scale * (W z + b) + offset    =  (scale W) z + (scale b + offset)

    Args:
        layers: (weight, bias) of each.
        mean, deviation: of the inputs, `[d]`.
        scale, offset: of the logits, `[n_labels]`.
    """
    wide = [(weight.double(), bias.double()) for weight, bias in layers]
    weight, bias = wide[0]
    weight = weight / deviation.double()
    wide[0] = weight, bias - weight @ mean.double()
    weight, bias = wide[-1]
    wide[-1] = weight * scale.double().unsqueeze(1), bias * scale.double() + offset.double()
    return [(weight.float(), bias.float()) for weight, bias in wide]


def forward(layers: Layers, states: torch.Tensor) -> torch.Tensor:
    """Return logits, `[n, n_labels]`."""
    for weight, bias in layers[:-1]:
        states = torch.addmm(bias, states, weight.T).relu()
    return torch.addmm(layers[-1][1], states, layers[-1][0].T)


def loss_of(logits: torch.Tensor, targets: torch.Tensor, *, is_exclusive: bool) -> torch.Tensor:
    """Return the mean loss, nats a row (exclusive) or a row's label."""
    if is_exclusive:
        return functional.cross_entropy(logits, targets.argmax(1))
    return functional.binary_cross_entropy_with_logits(logits, targets)


def _trained(
    fit: Labelled,
    validation: Labelled,
    recipe: Recipe,
    *,
    progress: Callable[[int, int], None] | None,
) -> tuple[Layers, int]:
    """Return the weights with the best validation loss, and the epochs they took."""
    generator = torch.Generator().manual_seed(recipe.seed)
    d, n_labels = fit.states.shape[1], fit.targets.shape[1]
    widths = [d, n_labels] if recipe.kind == "linear" else [d, *[recipe.hidden] * 2, n_labels]
    device = fit.states.device
    layers: Layers = []
    for before, after in pairwise(widths):
        weight, bias = _drawn(before, after, generator)
        layers.append((weight.to(device).requires_grad_(), bias.to(device).requires_grad_()))
    optimizer = torch.optim.AdamW(
        [part for layer in layers for part in layer],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    lowest, best, best_epoch = float("inf"), layers, 0
    for epoch in range(1, recipe.max_epochs + 1):
        for rows in torch.randperm(len(fit.states), generator=generator).split(recipe.batch):
            picked = rows.to(device)
            states = fit.states[picked]
            if recipe.noise:
                drawn = torch.randn(states.shape, generator=generator)
                states = states + recipe.noise * drawn.to(device)
            logits = forward(layers, states)
            loss = loss_of(logits, fit.targets[picked], is_exclusive=recipe.is_exclusive)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = forward(layers, validation.states)
            now = float(loss_of(logits, validation.targets, is_exclusive=recipe.is_exclusive))
        if now < lowest - recipe.least_gain:
            lowest, best_epoch = now, epoch
            best = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in layers]
        if progress is not None:
            progress(epoch, recipe.max_epochs)
        if epoch - best_epoch >= recipe.patience:
            break
    if best_epoch == 0:
        raise DataError("Training diverged: the validation loss is not a number at any epoch.")
    return best, best_epoch


def _drawn(
    before: int, after: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a linear layer as torch would draw it, from a generator of its own."""
    reach = before**-0.5
    weight = torch.empty(after, before).uniform_(-reach, reach, generator=generator)
    return weight, torch.empty(after).uniform_(-reach, reach, generator=generator)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(x), 6) for x in values]

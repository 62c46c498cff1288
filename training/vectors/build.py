"""From pairs to a stored vector: hidden states, direction, probe, calibration."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from trimtab.steering.errors import DataError
from trimtab.steering.vector import VectorArtifact
from trimtab.training.calibration import Budget, Progress, calibrate
from trimtab.training.scoring import Answer, answer_of
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.activations import Position, hidden_states
from trimtab.training.vectors.pairs import Pair, PairSet
from trimtab.training.vectors.probes import fit_probes
from trimtab.training.vectors.registry import ALIASES, DEFAULT, Method, ModelMethod, make

# Relative dose a layer when calibration is left out: small enough for one layer of any model.
UNCALIBRATED_DOSE = 0.1


def build_vector(
    host: SteeredModel,
    pairs: PairSet,
    *,
    id: str,
    method: str = DEFAULT,
    options: dict[str, Any] | None = None,
    position: Position = "mean",
    normalize: bool = False,
    is_calibrated: bool = True,
    is_mapped: bool = False,
    budget: Budget | None = None,
    description: str = "",
    progress: Progress | None = None,
) -> VectorArtifact:
    """Build a steering vector.

    The direction is fitted on three quarters of the build pairs, the probe and the calibration use
    the fourth quarter, and held pairs are never read.

    Args:
        host: the model.
        pairs: what to build from.
        id: the vector's name.
        method: registry name or alias.
        options: the method's options.
        position: which of an answer's tokens to read; for a method that asks the model itself only
            the probe's.
        normalize: whether steering keeps the hidden norm by default.
        is_calibrated: choose layers and scale by measurement; otherwise the middle layer at a
            relative dose of 0.1.
        is_mapped: measure effect and damage of other layers and scales too, for the calibration's
            record; it changes nothing that steers.
        budget: what calibration may spend and accept.
        description: a sentence for people.
        progress: told of each stage's steps.

    Raises:
        NotFoundError: unknown method.
        DataError: unknown option, an answer longer than the model's context, data from which
            no direction comes out, or a map without calibration.
    """
    if is_mapped and not is_calibrated:
        raise DataError(
            "A map shows multiples of the calibrated dose; without calibration there is none. "
            "Calibrate, or leave the map out.",
            param="is_mapped",
        )
    fitter = make(method, options)
    check_pairs(pairs, fitter)
    fit, calibration = pairs.fit_and_calibration()

    def reading(done: int, total: int) -> None:
        if progress is not None:
            progress("reading hidden states", done, total)

    def asking(done: int, total: int) -> None:
        if progress is not None:
            progress("attributing prompts", done, total)

    def finding(done: int, total: int) -> None:
        if progress is not None:
            progress("finding directions", done, total)

    longest = host.profile.max_context

    def answers_of(pair: Pair) -> tuple[Answer, Answer]:
        return answers_to(host.tokenizer, pair, max_context=longest)

    answers = [tokens for pair in fit + calibration for tokens in answers_of(pair)]
    if isinstance(fitter, ModelMethod):  # first, for it may refuse the pairs
        directions = fitter.find(host, fit, progress=asking)
    states = hidden_states(host, answers, position=position, progress=reading)
    states = states.view(-1, 2, *states.shape[1:])
    n = len(fit)
    if not isinstance(fitter, ModelMethod):
        directions = fitter.fit(states[:n, 0], states[:n, 1], progress=finding)
    if not torch.isfinite(directions).all() or bool((directions.norm(dim=1) == 0).any()):
        raise DataError(
            f"{pairs.name}: {method} finds no direction; the two sides look the same to the model."
        )
    probes = fit_probes(directions, states[:n], states[n:])
    norms = host.profile.hidden_norms
    if is_calibrated:
        chosen = calibrate(
            host,
            directions,
            [answers_of(pair) for pair in calibration],
            normalize=normalize,
            is_mapped=is_mapped,
            budget=budget,
            progress=progress,
        )
        layers, dose, record = chosen.layers, chosen.dose, chosen.record
    else:
        layers, dose, record = (len(norms) // 2,), UNCALIBRATED_DOSE, None
    units = directions / directions.norm(dim=1, keepdim=True)
    return VectorArtifact(
        id=id,
        model=host.profile.ref,
        layers=tuple(range(len(norms))),
        directions=units * (dose * norms).unsqueeze(1),
        default_layers=layers,
        method=ALIASES.get(method, method),
        settings={**asdict(fitter), "position": position},  # type: ignore[call-overload]
        data={
            "name": pairs.name,
            "sha256": pairs.sha256,
            "n_fit": len(fit),
            "n_calibration": len(calibration),
            "n_held": len(pairs.held),
            "n_dropped": pairs.n_dropped,
            "probe_accuracy": [round(x, 4) for x in probes.accuracy],
        },
        probe=probes.table,
        probe_layer=probes.best,
        normalize=normalize,
        calibration=record,
        description=description,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trimtab_version=version("trimtab"),
    )


def check_pairs(pairs: PairSet, fitter: Method) -> None:
    """Refuse pairs that a method cannot be fitted and calibrated on.

    Raises:
        DataError: there are too few, or the method can learn nothing from them.
    """
    fit, calibration = pairs.fit_and_calibration()
    if len(calibration) < 2:
        raise DataError(
            f"{pairs.name}: too few pairs to set some aside for calibration. Every fourth prompt's "
            "are, and two are needed: give eight prompts or more besides those that are held."
        )
    if isinstance(fitter, ModelMethod):
        fitter.check(fit)


def answers_to(tokenizer: Any, pair: Pair, *, max_context: int) -> tuple[Answer, Answer]:
    """Return the tokens of a pair's two sides.

    Raises:
        DataError: one is longer than what the model attends to, or too short to be scored.
    """
    preferred, dispreferred = (
        answer_of(tokenizer, pair.prompt, text) for text in (pair.preferred, pair.dispreferred)
    )
    longest = max(len(preferred.ids), len(dispreferred.ids))
    if longest > max_context:
        start = (pair.prompt or pair.preferred)[:60]
        raise DataError(
            f"The pair that begins {start!r} has {longest} tokens; the model attends to "
            f"{max_context}. Shorten it."
        )
    return preferred, dispreferred

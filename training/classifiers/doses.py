"""How far a classifier may steer before text falls apart, found for each label set.

Greedy answers to neutral questions are generated at a dose and judged by `training.coherence`; the
largest dose at which few enough fall apart is kept. Past it the fall is sharp (K-Steering's own
grids go from 90 % success to collapse within a quarter of the step size), so requests over it are
refused unless they say that they mean it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trimtab.steering.classifier import ClassifierArtifact, SafeDose
from trimtab.steering.errors import DataError
from trimtab.steering.guidance import steps_of
from trimtab.steering.lookup import reader_at
from trimtab.steering.plan import Guide, LayerTerm, Plan, plan_of
from trimtab.training.calibration import Progress
from trimtab.training.coherence import MAX_SHARE, Coherence, largest_dose, signs_of
from trimtab.training.scoring import answer_of, generate
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.neutral import neutral_questions

_LOW, _HIGH = 0.02, 1.5
_REFLECTIONS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class LabelSet:
    """What a request may ask of a classifier; see `SafeDose` for the fields."""

    target: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    picks_rival: bool = False
    is_reflection: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", tuple(sorted(self.target)))
        object.__setattr__(self, "avoid", tuple(sorted(self.avoid)))

    def __str__(self) -> str:
        words = [*self.target, *(f"-{label}" for label in self.avoid)]
        if self.picks_rival:
            words.append("-rival")
        return " ".join(words) + (" (reflected)" if self.is_reflection else "")


@dataclass(frozen=True)
class DoseBudget:
    """What finding the doses may spend and accept.

    Attributes:
        max_share: share of generations that may fall apart.
        n_prompts: neutral questions to answer.
        n_tokens: length of each answer.
        n_evaluations: doses tried for the first label set; four, near its dose, for the others.
    """

    max_share: float = MAX_SHARE
    n_prompts: int = 40
    n_tokens: int = 32
    n_evaluations: int = 7


def default_label_sets(labels: Sequence[str], *, with_pairs: bool = False) -> list[LabelSet]:
    """Return the sets to calibrate: each label sought, avoided and reflected.

    Args:
        labels: the classifier's.
        with_pairs: seek each pair as well; without, a pair gets the smallest dose measured.
    """
    singles = [LabelSet(target=(label,)) for label in labels]
    avoided = [LabelSet(avoid=(label,)) for label in labels]
    reflected = [LabelSet(avoid=(label,), is_reflection=True) for label in labels]
    pairs = [LabelSet(target=pair) for pair in itertools.combinations(labels, 2)]
    return [*singles, *avoided, *reflected, *(pairs if with_pairs else [])]


def calibrate_doses(
    host: SteeredModel,
    classifier: ClassifierArtifact,
    *,
    label_sets: Sequence[LabelSet] | None = None,
    budget: DoseBudget | None = None,
    progress: Progress | None = None,
) -> ClassifierArtifact:
    """Return the classifier with the largest safe dose of each label set at its default layers.

    Args:
        host: the model.
        classifier: what to calibrate; doses of other label sets that it has are kept.
        label_sets: which; None takes `default_label_sets`.
        budget: what may be spent and accepted.
        progress: told of the label sets done.

    Raises:
        DataError: a label the classifier does not have, or a model that falls apart unsteered.
    """
    budget = budget or DoseBudget()
    wanted = list(default_label_sets(classifier.labels) if label_sets is None else label_sets)
    for one in wanted:
        unknown = {*one.target, *one.avoid} - set(classifier.labels)
        if unknown:
            raise DataError(
                f"Classifier {classifier.id!r} has no label {sorted(unknown)[0]!r}; it has "
                f"{', '.join(classifier.labels)}."
            )
    if progress is not None:
        progress("finding doses", 0, len(wanted))
    coherence, prompts = _answerable(host, budget)

    def share(plan: Plan) -> float:
        return coherence.incoherent_share(host, prompts, plan, n_tokens=budget.n_tokens)

    found, curves = [], []
    near: float | None = None
    for done, one in enumerate(wanted):
        tried: dict[float, float] = {}

        def share_at(dose: float, one: LabelSet = one, tried: dict[float, float] = tried) -> float:
            tried[dose] = share(plan_at(host, classifier, one, dose))
            return tried[dose]

        if one.is_reflection:
            fits = (dose for dose in _REFLECTIONS if share_at(dose) <= budget.max_share)
            dose = next(fits, 0.0)
        else:
            dose = _largest(share_at, near=near, budget=budget)
            near = dose or near
        found.append(SafeDose(**asdict(one), dose=dose))
        curve = [[round(x, 5), round(tried[x], 4)] for x in sorted(tried)]
        curves.append({**asdict(one), "dose": round(dose, 6), "curve": curve})
        if progress is not None:
            progress("finding doses", done + 1, len(wanted))
    fresh = {_key(entry) for entry in found}
    kept = [entry for entry in classifier.doses if _key(entry) not in fresh]
    record: dict[str, Any] = {
        "criteria": asdict(budget),
        "limits": {name: round(x, 6) for name, x in asdict(coherence).items()},
        "n_prompts": len(prompts),
        "label_sets": curves,
    }
    return replace(classifier, doses=(*kept, *found), calibration=record)


def plan_at(
    host: SteeredModel,
    classifier: ClassifierArtifact,
    labels: LabelSet,
    dose: float,
    *,
    n_steps: int = 1,
    decay: float = 1.0,
) -> Plan:
    """Return the plan that guides every token toward a label set at a dose.

    Args:
        host: the model.
        classifier: guides at its default layers.
        labels: where to.
        dose: relative to |h|; of a reflection the share turned.
        n_steps: steps that share the dose.
        decay: length of a step relative to the one before.
    """
    layers = {}
    for layer in classifier.default_layers:
        norm = 1.0 if labels.is_reflection else float(host.profile.hidden_norms[layer])
        guide = Guide(
            reader=reader_at(classifier, layer),
            toward=tuple(classifier.labels.index(x) for x in labels.target),
            away=tuple(classifier.labels.index(x) for x in labels.avoid),
            sizes=steps_of(dose * norm, n_steps=n_steps, decay=decay),
            step="reflect" if labels.is_reflection else "unit",
            picks_rival=labels.picks_rival,
        )
        layers[layer] = LayerTerm(guides=(guide,))
    return plan_of(layers)


def _largest(
    share_at: Callable[[float], float], *, near: float | None, budget: DoseBudget
) -> float:
    """Return the largest dose, looked for near another set's first: few sets differ by much."""
    if near is not None:
        dose = largest_dose(
            share_at, low=near / 2, high=near * 2, limit=budget.max_share, n_evaluations=4
        )
        if dose > 0:
            return dose
    return largest_dose(
        share_at,
        low=_LOW,
        high=_HIGH if near is None else near / 2,
        limit=budget.max_share,
        n_evaluations=budget.n_evaluations,
    )


def _answerable(host: SteeredModel, budget: DoseBudget) -> tuple[Coherence, list[tuple[int, ...]]]:
    """Return the limits, and neutral questions that the unsteered model answers within them.

    Small models loop on some questions by themselves; those say nothing about a dose. Of the rest
    those of the commonest lengths are taken, for prompts of one length are a batch.
    """
    answers = [answer_of(host.tokenizer, question, "") for question in neutral_questions()]
    prompts = [answer.ids[: answer.n_prompt] for answer in answers]
    signs = signs_of(host, prompts, generate(host, prompts, budget.n_tokens))
    coherence = Coherence.of(signs)
    fine = [
        prompt
        for prompt, one in zip(prompts, signs, strict=True)
        if not coherence.is_incoherent(one)
    ]
    if len(fine) < budget.n_prompts:
        raise DataError(
            f"The unsteered model answers only {len(fine)} of {len(prompts)} neutral questions "
            f"without looping; {budget.n_prompts} are wanted."
        )
    counts = Counter(map(len, fine))
    fine.sort(key=lambda ids: (-counts[len(ids)], len(ids)))
    return coherence, fine[: budget.n_prompts]


def _key(entry: SafeDose) -> tuple[Any, ...]:
    return entry.target, entry.avoid, entry.picks_rival, entry.is_reflection

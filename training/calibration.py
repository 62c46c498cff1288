"""Choose a vector's layers and scale 1.0: effect at equal damage, then the whole curve.

Layers. A single layer and short runs of layers are compared at the same damage: for each, the
relative dose is found at which perplexity on neutral text rises by `Budget.max_rise`, and the one
whose dose moves the calibration pairs' margin most is taken. Damage grows with about the square of
the dose, so two evaluations find it.

Scale. On the chosen layers the curve over multiples -1 to 4 of that dose is measured, with
generations. While the margin does not rise monotonically over -1, -0.5, 0, 0.5, 1, or greedy
generations at 1 are degenerate, the dose is lowered. What remains is scale 1.0.

Map, if asked for. That dose on every single layer and on the chosen ones, at several scales: see
`layer_map.py`.

Margin is the mean over pairs of the preferred answer's mean log-probability a token minus the
dispreferred one's. Damage is measured on text and prompts that have nothing to do with the concept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.steering.plan import Plan, additive_plan
from trimtab.training.layer_map import layer_map, mapped_layers
from trimtab.training.repetition import repetition as repetition_of
from trimtab.training.scoring import Answer, answer_logprobs, answer_of, generate, perplexity
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.neutral import neutral_questions, neutral_text

Progress = Callable[[str, int, int], None]
"""Called with a stage, steps done and steps in all."""

SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
_N_CHOOSING = 8
_FIRST_DOSE = 0.1


@dataclass(frozen=True)
class Budget:
    """What calibration may spend and accept.

    Attributes:
        max_rise: relative rise of perplexity on neutral text at scale 1.0.
        max_repetition: share of repeated 3-grams in greedy generations at scale 1.0, above the
            unsteered model's own.
        n_text_tokens: length of the neutral text.
        n_generated: tokens of each generation.
        n_prompts: prompts generated from.
    """

    max_rise: float = 0.08
    max_repetition: float = 0.15
    n_text_tokens: int = 512
    n_generated: int = 24
    n_prompts: int = 4


@dataclass(frozen=True)
class CurvePoint:
    """One multiple of scale 1.0.

    Attributes:
        scale: the multiple.
        margin: mean margin of the calibration pairs, nats a token.
        moved: share of pairs whose margin is on the side the scale pushes to, against scale 0.
        rise: relative rise of perplexity on neutral text.
        repetition: mean share of repeated 3-grams in greedy generations.
        entropy: mean entropy of the choices in them, nats.
        surprise: perplexity of those generations for the unsteered model.
    """

    scale: float
    margin: float
    moved: float
    rise: float
    repetition: float
    entropy: float
    surprise: float


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        layers: default layers.
        dose: relative dose at each of them at scale 1.0.
        record: everything as plain JSON, for the artifact: `criteria`, `candidates` (layers, dose
            at equal damage, effect), `curve`, `knee`, `n_pairs`, and `map` if it was asked for.
    """

    layers: tuple[int, ...]
    dose: float
    record: dict[str, Any]


def candidate_layers(n_layers: int) -> list[tuple[int, ...]]:
    """Return the layer sets to compare: single layers and runs of four, 25 to 85 % of depth."""
    first, last = round(0.25 * n_layers), round(0.85 * n_layers)
    singles = [(layer,) for layer in range(first, last + 1, max(1, n_layers // 15))]
    length = min(4, max(2, n_layers // 8))
    runs = [
        tuple(range(start, start + length))
        for start in range(first, last - length + 2, max(1, n_layers // 10))
    ]
    sets = [s for s in singles + runs if all(layer < n_layers for layer in s)]
    return sets or [(n_layers - 1,)]


def calibrate(
    host: SteeredModel,
    directions: torch.Tensor,
    pairs: Sequence[tuple[Answer, Answer]],
    *,
    candidates: Sequence[tuple[int, ...]] | None = None,
    normalize: bool = False,
    is_mapped: bool = False,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose layers and dose for a direction.

    Args:
        host: the model.
        directions: one a layer, `[n_layers, d]`, float32, any length.
        pairs: calibration pairs (preferred, dispreferred) the directions were not fitted on.
        candidates: layer sets to compare; None takes `candidate_layers`.
        normalize: whether requests will keep the hidden norm.
        is_mapped: measure other layers and scales at the chosen dose as well.
        budget: what may be spent and accepted.
        progress: told of each stage's steps.
    """
    sets = list(candidates or candidate_layers(len(directions)))
    if progress is not None:
        progress("choosing layers", 0, len(sets))
    bench = _Bench(host, directions, pairs, normalize=normalize, budget=budget or Budget())
    tried = []
    for i, layers in enumerate(sets):
        tried.append(bench.try_layers(layers))
        if progress is not None:
            progress("choosing layers", i + 1, len(sets))
    best = max(tried, key=lambda t: t["effect"])
    layers, dose = tuple(best["layers"]), best["dose"]
    curve: list[CurvePoint] = []
    for attempt in range(5):
        curve = []
        for i, scale in enumerate(SCALES):
            curve.append(bench.point(layers, dose, scale))
            if progress is not None:
                # A dose that is tried again is more to do, not the same once more.
                done = attempt * len(SCALES) + i + 1
                progress("measuring the curve", done, (attempt + 1) * len(SCALES))
        problem = bench.problem(curve)
        if problem is None or attempt == 4:
            break
        dose *= 0.75
    knee = {"layers": list(layers), "dose": dose, "is_clean": problem is None, "problem": problem}
    record = {
        "criteria": asdict(bench.budget),
        "n_pairs": len(pairs),
        "candidates": tried,
        "curve": [asdict(point) for point in curve],
        "knee": knee,
    }
    if is_mapped:
        cells = layer_map(
            bench.effect_and_rise, mapped_layers(sets, layers), dose=dose, progress=progress
        )
        record["map"] = {**cells, "n_pairs": len(bench.choosing)}
    return Calibration(layers, dose, _rounded(record))


class _Bench:
    def __init__(
        self,
        host: SteeredModel,
        directions: torch.Tensor,
        pairs: Sequence[tuple[Answer, Answer]],
        *,
        normalize: bool,
        budget: Budget,
    ) -> None:
        self.host = host
        self.units = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.norms = host.profile.hidden_norms
        self.pairs = list(pairs)
        self.choosing = self.pairs[:_N_CHOOSING]
        self.normalize = normalize
        self.budget = budget
        self.text = host.tokenizer(neutral_text())["input_ids"][: budget.n_text_tokens]
        questions = neutral_questions()[: budget.n_prompts]
        answers = [answer_of(host.tokenizer, q, "") for q in questions]
        self.prompts = [a.ids[: a.n_prompt] for a in answers]
        self.base_perplexity = perplexity(host, self.text)
        self.base_margins = self.margins(None, self.pairs)

    def plan(self, layers: Sequence[int], dose: float) -> Plan | None:
        if dose == 0.0:
            return None
        rows = {n: self.units[n] * dose * float(self.norms[n]) for n in layers}
        return additive_plan(rows, normalize=self.normalize)

    def margins(self, plan: Plan | None, pairs: Sequence[tuple[Answer, Answer]]) -> torch.Tensor:
        scores = answer_logprobs(self.host, [a for pair in pairs for a in pair], plan=plan)
        return scores[0::2] - scores[1::2]

    def rise(self, plan: Plan | None) -> float:
        return perplexity(self.host, self.text, plan=plan) / self.base_perplexity - 1.0

    def try_layers(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return the effect of a layer set at the dose that uses up the damage budget."""
        dose, target = _FIRST_DOSE / len(layers) ** 0.5, self.budget.max_rise
        for _ in range(2):
            rise = max(self.rise(self.plan(layers, dose)), target / 25)
            dose *= min(3.0, max(1 / 3, (target / rise) ** 0.5))
        plans = (self.plan(layers, s * dose) for s in (1, -1))
        up, down = (self.margins(plan, self.choosing).mean() for plan in plans)
        return {"layers": list(layers), "dose": dose, "effect": float(up - down)}

    def effect_and_rise(self, layers: Sequence[int], dose: float) -> tuple[float, float]:
        """Return how far a signed dose moves the pairs used for choosing, and its damage."""
        plan = self.plan(layers, dose)
        base = self.base_margins[: len(self.choosing)].mean()
        return float(self.margins(plan, self.choosing).mean() - base), self.rise(plan)

    def point(self, layers: Sequence[int], dose: float, scale: float) -> CurvePoint:
        plan = self.plan(layers, dose * scale)
        margins = self.margins(plan, self.pairs)
        moved = (margins - self.base_margins) * (1.0 if scale >= 0 else -1.0) > 0
        texts = generate(self.host, self.prompts, self.budget.n_generated, plan=plan)
        answers = [
            Answer((*prompt, *text.ids), len(prompt))
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        surprise = float((-answer_logprobs(self.host, answers).mean()).exp())
        n = max(1, len(texts))
        return CurvePoint(
            scale=scale,
            margin=float(margins.mean()),
            moved=float(moved.float().mean()) if scale else 0.0,
            rise=self.rise(plan) if scale else 0.0,
            repetition=sum(repetition_of(text.ids) for text in texts) / n,
            entropy=sum(text.entropy for text in texts) / n,
            surprise=surprise,
        )

    def problem(self, curve: Sequence[CurvePoint]) -> str | None:
        """Return what is wrong with scale 1.0, or None."""
        points = {point.scale: point for point in curve}
        inner = [points[s].margin for s in SCALES if abs(s) <= 1.0]
        if any(b <= a for a, b in itertools.pairwise(inner)):
            return "the margin does not rise monotonically from scale -1 to 1"
        if points[1.0].rise > 1.5 * self.budget.max_rise:
            return f"perplexity rises by {points[1.0].rise:.0%} at scale 1"
        if points[1.0].repetition > points[0.0].repetition + self.budget.max_repetition:
            return f"generations repeat themselves ({points[1.0].repetition:.0%}) at scale 1"
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value

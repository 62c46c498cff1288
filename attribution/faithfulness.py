"""Whether the tokens that a method scores high are the ones the answer hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.problem import Problem
from trimtab.attribution.removal import hard_metrics, permuted
from trimtab.attribution.soft_removal import soft_metrics

_SHARE = 0.2


@dataclass(frozen=True)
class Measure:
    """A metric of some scores, and of the same scores in random places.

    Attributes:
        value: the metric.
        control: its mean over the permutations.
        control_sd: its standard deviation over them; 0 where they all come to the same.
    """

    value: float
    control: float
    control_sd: float


@dataclass(frozen=True)
class Faithfulness:
    """How F and the answers respond when tokens are taken away by score.

    Attributes:
        deletion: F with the highest 0, 10, ... 100 % of the tokens taken away, nats.
        insertion: F with only the highest 0, 10, ... 100 % there, nats.
        delta_af: area under F when the lowest go first, minus the area when the highest go first,
            nats; higher is better, and 0 is what random scores get.
        aopc: mean loss of F over the first half of `deletion`, nats; higher is better.
        comprehensiveness: loss of F without the highest share, nats; higher is better.
        sufficiency: loss of F with only the highest share, nats; lower is better.
        soft_comprehensiveness: how far the answers' probabilities move, either way, when tokens
            with large scores of either sign lose most of their embedding, in units of what taking
            everything away does; higher is better. None if that does nothing, or the baseline has
            no embedding.
        soft_sufficiency: how near they stay when those tokens keep most, likewise; 0 to 1.
        infidelity: share of F's losses under random masks, as a mean square, that the scores leave
            unexplained at their best positive scale; 0 to 1, lower is better. None if F never
            changes.
        n_controls: permutations.
        rows: variants of the prompt read; several scores compared at once share them.
    """

    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    delta_af: Measure
    aopc: Measure
    comprehensiveness: Measure
    sufficiency: Measure
    soft_comprehensiveness: Measure | None
    soft_sufficiency: Measure | None
    infidelity: Measure | None
    n_controls: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON takes it."""
        return asdict(self)


def faithfulness(
    problem: Problem,
    scores: torch.Tensor,
    *,
    n_controls: int = 8,
    n_masks: int = 64,
    n_draws: int = 4,
    share: float = _SHARE,
    seed: int = 0,
) -> Faithfulness:
    """Measure one method's scores; see `compare`."""
    found = compare(
        problem,
        {"scores": scores},
        n_controls=n_controls,
        n_masks=n_masks,
        n_draws=n_draws,
        share=share,
        seed=seed,
    )
    return found["scores"]


def compare(
    problem: Problem,
    scores: Mapping[str, torch.Tensor],
    *,
    n_controls: int = 8,
    n_masks: int = 64,
    n_draws: int = 4,
    share: float = _SHARE,
    seed: int = 0,
) -> dict[str, Faithfulness]:
    """Measure the scores of several methods on one question, each beside permutations of itself.

    Costs at most `20 (m + c) + 2 d (m + c) + k + 2` rows for m methods, c controls, d draws and k
    masks, less what coincides. Scores are ranked with their sign: a token that speaks against the
    answer is the last to go. Soft metrics alone rank by size.

    Source: area between the curves: AttnLRP, arXiv 2402.05602; AOPC: Samek et al., arXiv
    1509.06321; hard sufficiency and comprehensiveness: DeYoung et al., arXiv 1911.03429; soft
    ones: Zhao and Aletras, arXiv 2305.10496; infidelity: Yeh et al., arXiv 1901.09392.

    Differs: losses are of F in nats, not of a probability. Soft metrics scale the scores' sizes by
    rank to one mean keep rate, since the published form rewards whoever keeps more. Their distance
    is Hellinger's between each token of the answers and all other tokens, averaged over the
    answers, where the papers compare the whole distribution of the next token once. Infidelity is
    divided by the losses' own mean square at the best scale, which may not be negative, so that
    flipped scores fail.

    Args:
        problem: the question; its baseline replaces what is taken away.
        scores: name -> `[n]`, one score a content token, any scale.
        n_controls: permutations of each method's scores, at least 2.
        n_masks: random masks for infidelity, at least 1, each token away with probability 1/2.
        n_draws: draws of each soft metric, at least 1.
        share: of the tokens the hard sufficiency and comprehensiveness take, 0 to 1.
        seed: of the permutations, masks and draws.

    Raises:
        AttributionError: no scores, or ones of another shape or not finite, or an option out of
            range.
    """
    _check(problem, scores, n_controls=n_controls, n_masks=n_masks, n_draws=n_draws, share=share)
    before = problem.forward_rows
    own = [s.detach().cpu().double() for s in scores.values()]
    signed, sizes = (
        # [m * (1 + n_controls), n]: each method's scores, then the same scores permuted.
        torch.cat([row for s in kind for row in (s[None], permuted(s, n_controls, seed))])
        for kind in (own, [s.abs() for s in own])
    )
    generator = torch.Generator().manual_seed(seed + 1)
    random = torch.rand(n_masks, problem.n, generator=generator) < 0.5
    metrics, deletion, insertion = hard_metrics(problem, signed, random, share=share)
    metrics.update(soft_metrics(problem, sizes, n_draws, generator))
    rows = problem.forward_rows - before
    shape = (len(own), 1 + n_controls)

    def measure(name: str, i: int) -> Measure | None:
        values = metrics[name]
        if values is None:
            return None
        value, control = values.view(shape)[i].tensor_split([1])
        return Measure(float(value), float(control.mean()), float(control.std()))

    return {
        name: Faithfulness(
            deletion=tuple(deletion.view(*shape, -1)[i, 0].tolist()),
            insertion=tuple(insertion.view(*shape, -1)[i, 0].tolist()),
            n_controls=n_controls,
            rows=rows,
            **{metric: measure(metric, i) for metric in metrics},  # type: ignore[arg-type]
        )
        for i, name in enumerate(scores)
    }


def _check(problem: Problem, scores: Mapping[str, torch.Tensor], **options: float) -> None:
    if not scores:
        raise AttributionError("There are no scores to measure.", param="scores")
    for name, values in scores.items():
        if tuple(values.shape) != (problem.n,) or not torch.isfinite(values).all():
            raise AttributionError(
                f"Scores {name!r} have the shape {list(values.shape)}; expected {problem.n} finite "
                "numbers, one a content token.",
                param="scores",
            )
    limits = {"n_controls": (2, 1024), "n_masks": (1, 16384), "n_draws": (1, 1024), "share": (0, 1)}
    for option, (least, most) in limits.items():
        if not least <= options[option] <= most:
            raise AttributionError(
                f"Option {option!r} is {options[option]}; expected {least} to {most}.", param=option
            )

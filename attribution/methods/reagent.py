"""ReAGent: importance learned from random replacements, without gradients."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.methods.replacement import PLACES_A_CALL, REPLACERS, Replacement
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem

_LIMITS = {
    "steps": (1, 1000),
    "chains": (1, 64),
    "replace": (0.01, 1.0),
    "keep": (0.01, 0.99),
    "tolerance": (0.0, 1.0),
}
# A difference of probabilities of exactly 1 would be an infinite update.
_LARGEST = 1 - 1e-6


@dataclass(frozen=True)
class ReAGent:
    """Shares of importance, raised by every replacement that makes the answer less likely.

    Several chains each keep a running score of every token. A step replaces some tokens by
    others; what the answer's probability loses is added to the tokens replaced and taken from the
    rest. The scores are shares: positive, summing to 1 and not in nats.

    Options:
        steps: most steps of a chain.
        chains: independent chains; those that stopped early are averaged, or all if none did.
        replace: share of the tokens replaced in a step.
        keep: share of the tokens that must be enough for the answer before a chain stops.
        tolerance: a chain stops once its highest tokens alone bring the probability within this
            share of what it was.
        replacer: `model` draws stand-ins from the model's own prediction, given what stands
            before; `uniform` from the vocabulary; `baseline` takes the token away.
        seed: of everything drawn.

    Source: Zhao and Shan, arXiv 2402.00794; casszhao/ReAGent.

    Differs: the paper explains one token's probability. Here p is the geometric mean of the
    answer's token probabilities, or the sigmoid of the log-probability contrast of two answers.
    The paper stops when the answer's token is among the model's first three, which has no like
    for whole answers, so a chain stops when p itself is back. The paper draws stand-ins by
    RoBERTa, its code by part of speech; neither model is needed here.
    """

    steps: int = 32
    chains: int = 5
    replace: float = 0.3
    keep: float = 0.3
    tolerance: float = 0.1
    replacer: str = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replacer not in REPLACERS:
            raise AttributionError(
                f"Option 'replacer' is {self.replacer!r}; expected one of {', '.join(REPLACERS)}.",
                param="params.replacer",
            )
        for name, value in asdict(self).items():
            least, most = _LIMITS.get(name, (value, value))
            if not least <= value <= most:
                raise AttributionError(
                    f"Option {name!r} is {value}; expected {least} to {most}.",
                    param=f"params.{name}",
                )

    def cost(self, n: int) -> int:
        """Return two rows a step and chain, the prompt as it is, and the stand-ins' passes."""
        drawn = -(-n // PLACES_A_CALL) if self.replacer == "model" else 0
        return 2 * self.steps * self.chains + 1 + drawn

    def explain(self, problem: Problem) -> Scores:
        """Return each token's share, averaged over the chains."""
        n = problem.n
        generator = torch.Generator().manual_seed(self.seed)
        replacement = Replacement(problem, self.replacer, generator)
        nothing = torch.zeros(1, n, dtype=torch.bool)
        own = _probability(replacement.values(nothing), problem.objective)
        # As in the paper: a start between 0 and 1, which the updates outgrow.
        scores = torch.rand(self.chains, n, generator=generator, dtype=torch.float64)
        n_kept = min(max(1, round(self.keep * n)), n - 1)
        running = torch.arange(self.chains)
        n_steps = 0
        while len(running) and n_steps < self.steps:
            away = torch.rand(len(running), n, generator=generator) < self.replace
            one = torch.randint(n, (len(running), 1), generator=generator)
            away.scatter_(1, one, True)  # a step that replaces nothing tells nothing
            low = scores[running].argsort(1, descending=True).argsort(1) >= n_kept
            values = replacement.values(torch.cat([away, low]))
            without, only = _probability(values, problem.objective).chunk(2)
            is_enough = (only - own).abs() <= self.tolerance * own
            goes_on = ~is_enough if n_steps else torch.ones_like(is_enough)
            lost = (own - without).clamp(-_LARGEST, _LARGEST).unsqueeze(1)
            updates = torch.logit((torch.where(away, lost, -lost) + 1) / 2)
            scores[running[goes_on]] += updates[goes_on]
            running = running[goes_on]
            n_steps += 1
        has_stopped = torch.ones(self.chains, dtype=torch.bool)
        has_stopped[running] = False
        averaged = scores[has_stopped] if has_stopped.any() else scores
        return Scores(
            averaged.softmax(1).mean(0).float(),
            units="share",
            facts={"steps_taken": n_steps, "chains_stopped": int(has_stopped.sum())},
        )


def _probability(values: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Return p of F, `[batch]`, float64 (see `Differs`)."""
    if objective.dispreferred is not None:
        return values.sigmoid()
    n_tokens = 1 if objective.is_normalized else len(objective.preferred)
    return (values / n_tokens).exp()

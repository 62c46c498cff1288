"""Is a generation still language? A measure without a judge, and the largest dose that keeps it.

Three signs of each greedy generation are compared with the unsteered model's own:

    surprise     mean -log P a token under the unsteered model. Its perplexity may be twice that of
                 the oddest in a hundred of the model's own greedy answers.
    repetition   share of 3-grams that occurred before: loops.
    entropy      mean entropy of the steered model's choices: a model that can only say one thing.

The limits come from greedy answers, not sampled ones: what a small model samples at temperature 1
is often no language either (SmolLM2-135M: 4.5 nats a token at the 99th percentile, greedy 1.05).

A generation is incoherent if one of them is beyond its limit, or if it is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.steering.errors import DataError
from trimtab.steering.plan import Plan
from trimtab.training.repetition import repetition
from trimtab.training.scoring import (
    Answer,
    Generation,
    answer_logprobs,
    end_tokens,
    generate,
)
from trimtab.training.steered_model import SteeredModel

MAX_SHARE = 0.05
"""Share of incoherent generations at which a dose is too large."""

MAX_REPETITION = 0.3
"""Share of repeated 3-grams past which an answer loops: nine of thirty. A list whose items begin
alike stays below. Not the model's own quantile, for small models loop by themselves."""

_TIMES_PERPLEXITY = 2.0


@dataclass(frozen=True)
class Signs:
    """What one generation shows.

    Attributes:
        n_tokens: its length without an end mark.
        surprise: mean -log P a token under the unsteered model, nats.
        repetition: share of repeated 3-grams, 0 to 1.
        entropy: mean entropy of the choices, nats.
    """

    n_tokens: int
    surprise: float
    repetition: float
    entropy: float


@dataclass(frozen=True)
class Coherence:
    """Limits beyond which a generation is incoherent.

    Attributes:
        max_surprise: nats a token.
        max_repetition: share of 3-grams.
        min_entropy: nats.
    """

    max_surprise: float
    max_repetition: float
    min_entropy: float

    @classmethod
    def of(cls, greedy: Sequence[Signs], *, quantile: float = 0.99) -> Coherence:
        """Return limits from unsteered greedy generations.

        Args:
            greedy: generations made as the judged ones will be; empty ones do not count.
            quantile: share of them that is taken for language.

        Raises:
            DataError: there are none.
        """
        said = [signs for signs in greedy if signs.n_tokens]
        if not said:
            raise DataError("Limits of coherence take unsteered generations; give more prompts.")
        surprises = torch.tensor([signs.surprise for signs in said])
        entropies = torch.tensor([signs.entropy for signs in said])
        return cls(
            float(surprises.quantile(quantile)) + math.log(_TIMES_PERPLEXITY),
            MAX_REPETITION,
            0.5 * float(entropies.quantile(1 - quantile)),
        )

    @classmethod
    def fit(
        cls, host: SteeredModel, prompts: Sequence[Sequence[int]], *, n_tokens: int = 32
    ) -> Coherence:
        """Return limits from the unsteered model's own answers to prompts.

        Args:
            host: the model.
            prompts: token ids of each.
            n_tokens: length of each generation; judge generations of the same length.
        """
        return cls.of(signs_of(host, prompts, generate(host, prompts, n_tokens)))

    def is_incoherent(self, signs: Signs) -> bool:
        """Return whether a generation is beyond a limit, or empty."""
        return bool(self.reasons(signs))

    def reasons(self, signs: Signs) -> list[str]:
        """Return which limits a generation is beyond, by name; `empty` if it says nothing."""
        beyond = {
            "empty": signs.n_tokens == 0,
            "surprise": signs.surprise > self.max_surprise,
            "repetition": signs.repetition > self.max_repetition,
            "entropy": signs.entropy < self.min_entropy,
        }
        return [name for name, is_beyond in beyond.items() if is_beyond]

    def share(self, signs: Sequence[Signs]) -> float:
        """Return the share of generations that are incoherent."""
        return sum(map(self.is_incoherent, signs)) / max(1, len(signs))

    def incoherent_share(
        self,
        host: SteeredModel,
        prompts: Sequence[Sequence[int]],
        plan: Plan | None,
        *,
        n_tokens: int = 32,
    ) -> float:
        """Return the share of greedy generations under a plan that are incoherent.

        Five percent of 20 prompts is one: take 40 or more, and of few lengths, for prompts of one
        length are generated from together.
        """
        return self.share(signs_of(host, prompts, generate(host, prompts, n_tokens, plan=plan)))


def signs_of(
    host: SteeredModel, prompts: Sequence[Sequence[int]], generations: Sequence[Generation]
) -> list[Signs]:
    """Return the signs of each prompt's generation, read by the unsteered model."""
    ends = end_tokens(host)
    lengths = [len(g.ids) - (g.ids[-1] in ends) for g in generations]
    rows = [i for i, n in enumerate(lengths) if n > 0]
    answers = [
        Answer((*prompts[i], *generations[i].ids[: lengths[i]]), len(prompts[i])) for i in rows
    ]
    surprises = dict(zip(rows, (-answer_logprobs(host, answers)).tolist(), strict=True))
    return [
        Signs(n, surprises.get(i, math.inf), repetition(g.ids[:n]), g.entropy)
        for i, (n, g) in enumerate(zip(lengths, generations, strict=True))
    ]


def largest_dose(
    share_at: Callable[[float], float],
    *,
    low: float,
    high: float,
    limit: float = MAX_SHARE,
    n_evaluations: int = 7,
) -> float:
    """Return the largest dose tried at which damage is within its limit, or 0.

    Bisection in log dose. Damage need not rise with the dose, so the dose found is followed by a
    look below it, and a dose passes only if every smaller one tried has passed.

    Args:
        share_at: damage at a dose.
        low: smallest dose of interest, over 0.
        high: largest dose of interest.
        limit: damage allowed.
        n_evaluations: calls of `share_at` at most, three or more; one more if `low` must be asked.

    Raises:
        DataError: `low` is not over 0 and under `high`, or there are too few evaluations.
    """
    if not 0 < low < high:
        raise DataError(f"Doses run from {low:g} to {high:g}; the first must be over 0 and less.")
    if n_evaluations < 3:
        raise DataError(f"A dose takes three evaluations or more to find, not {n_evaluations}.")
    passed: list[float] = []
    bottom, top = math.log(low), math.log(high)
    for _ in range(n_evaluations - 2):
        middle = (bottom + top) / 2
        if share_at(math.exp(middle)) <= limit:
            passed.append(bottom := middle)
        else:
            top = middle
    if not passed:
        return low if share_at(low) <= limit else 0.0
    # Twice: the middle of the widest stretch below the answer that nothing has looked at.
    for _ in range(2):
        known = [math.log(low), *passed]
        below, above = max(zip(known, passed, strict=False), key=lambda gap: gap[1] - gap[0])
        middle = (below + above) / 2
        if share_at(math.exp(middle)) <= limit:
            passed = sorted([*passed, middle])
            continue
        passed = [x for x in passed if x < middle]
        if not passed:
            return low if share_at(low) <= limit else 0.0
    return math.exp(max(passed))

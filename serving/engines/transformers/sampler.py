"""Choose each sequence's next token from its logits, by its own parameters and generator.

A sequence's choice never depends on its batch-mates: every random number comes from its own
generator, one a token, turned into a token by inverting the distribution function.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trimtab.serving.engines.base import Logprob, TokenLogprobs
from trimtab.serving.sampling import SamplingParams

# Candidates taken by a partial sort before a full one is tried; covers top_p in practice.
_NUCLEUS = 1024


@dataclass
class SamplerState:
    """What choosing a sequence's tokens remembers between steps.

    Attributes:
        params: the request's parameters.
        rng: the request's own generator.
        prompt: distinct prompt tokens (only kept for a repetition penalty).
        counts: how often each token was generated (only kept for penalties).
    """

    params: SamplingParams
    rng: random.Random
    prompt: frozenset[int] = frozenset()
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: Sequence[int]) -> SamplerState:
        """Start a sequence; without a seed the generator is seeded by the system."""
        prompt = frozenset(prompt_ids) if params.repetition_penalty != 1.0 else frozenset()
        return cls(params, random.Random(params.seed), prompt)

    def record(self, token_id: int) -> None:
        """Remember a chosen token."""
        if self.params.needs_history:
            self.counts[token_id] += 1


def choose(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """Return the next token of each sequence.

    Args:
        logits: `[n, vocab]`, any floating dtype; not changed.
        states: one a row.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    for i, state in enumerate(states):
        params = state.params
        if params.needs_history or params.logit_bias:
            row = adjust(logits[i].float(), state)
            chosen[i] = int(row.argmax())
        elif params.temperature > 0:
            row = logits[i].float()
        if params.temperature > 0:
            chosen[i] = _draw(row, params, state.rng.random())
    return chosen


def adjust(row: torch.Tensor, state: SamplerState) -> torch.Tensor:
    """Return one sequence's logits `[vocab]` after bias and penalties.

    Repetition penalty is CTRL's (arXiv 1909.05858, section 4.1): a seen token's logit is divided
    by it if positive, else multiplied. Presence and frequency penalties are OpenAI's:
    logit - presence * [count > 0] - frequency * count, over generated tokens.
    """
    params = state.params
    row = row.clone()
    seen = list(state.prompt | state.counts.keys())
    if params.repetition_penalty != 1.0 and seen:
        index = torch.tensor(seen, device=row.device)
        old = row[index]
        factor = params.repetition_penalty
        row[index] = torch.where(old > 0, old / factor, old * factor)
    if (params.presence_penalty or params.frequency_penalty) and state.counts:
        index = torch.tensor(list(state.counts), device=row.device)
        counts = torch.tensor(list(state.counts.values()), device=row.device, dtype=row.dtype)
        row[index] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        index = torch.tensor(list(params.logit_bias), device=row.device)
        row[index] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    return row


def _draw(row: torch.Tensor, params: SamplingParams, u: float) -> int:
    row = row / params.temperature
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p <= 0.0:
        weights = (row - row.max()).double().exp()
        return _invert(weights, u)
    probabilities, ids = _ranked(row, params)
    if params.min_p > 0.0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    if params.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        # Keep tokens until the mass before them reaches top_p; the first always stays.
        total = 1.0 if params.min_p <= 0.0 and params.top_k == 0 else float(probabilities.sum())
        probabilities = probabilities[before < params.top_p * total]
    return int(ids[_invert(probabilities, u)])


def _ranked(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return candidates' probabilities (float64, descending) and ids, as few as suffice."""
    n = row.shape[0]
    k = min(params.top_k or _NUCLEUS, n)
    log_total = torch.logsumexp(row.double(), 0)
    values, ids = row.topk(k)
    probabilities = (values.double() - log_total).exp()
    if params.top_k == 0 and k < n:
        if params.min_p > 0.0:
            enough = float(probabilities[-1]) < params.min_p * float(probabilities[0])
        else:
            enough = float(probabilities.sum()) >= params.top_p
        if not enough:
            values, ids = row.sort(descending=True)
            probabilities = (values.double() - log_total).exp()
    return probabilities, ids


def _invert(weights: torch.Tensor, u: float) -> int:
    """Return the index at share `u` in [0, 1) of the summed weights."""
    mass = weights.cumsum(0)
    index = int(torch.searchsorted(mass, mass[-1] * u, right=True))
    return min(index, weights.shape[0] - 1)


def token_logprobs(
    logits: torch.Tensor, ids: Sequence[int], *, top: int, text: Callable[[int], str]
) -> list[TokenLogprobs]:
    """Return the log-probabilities of chosen tokens under the model, before any penalty.

    Args:
        logits: `[n, vocab]`.
        ids: the chosen token of each row.
        top: alternatives to report with each.
        text: a token's text.
    """
    logprobs = logits.float().log_softmax(-1)
    index = torch.tensor(list(ids), device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, index)
    ranks = ((logprobs > own).sum(1) + 1).tolist()
    values, best = logprobs.topk(max(top, 1))
    result = []
    for i, token_id in enumerate(ids):
        alternatives = zip(best[i].tolist()[:top], values[i].tolist()[:top], strict=True)
        result.append(
            TokenLogprobs(
                chosen=Logprob(token_id, text(token_id), float(own[i]), ranks[i]),
                top=tuple(
                    Logprob(t, text(t), value, rank)
                    for rank, (t, value) in enumerate(alternatives, start=1)
                ),
            )
        )
    return result

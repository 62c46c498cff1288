"""The sampler against each parameter's own definition."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from trimtab.serving.engines.transformers.sampler import (
    SamplerState,
    adjust,
    choose,
    token_logprobs,
)
from trimtab.serving.sampling import SamplingParams

VOCAB = 50


def logits(seed: int = 0, n: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draws(params: SamplingParams, row: torch.Tensor, n: int = 4000) -> Counter[int]:
    state = SamplerState.of(params, [])
    return Counter(choose(row, [state])[0] for _ in range(n))


def expected(row: torch.Tensor, keep: set[int], temperature: float = 1.0) -> dict[int, float]:
    p = (row[0].double() / temperature).softmax(0)
    total = sum(float(p[i]) for i in keep)
    return {i: float(p[i]) / total for i in keep}


def close(counts: Counter[int], probabilities: dict[int, float], n: int = 4000) -> None:
    assert set(counts) <= set(probabilities)
    for token, p in probabilities.items():
        # Five standard deviations of a binomial share: a wrong rule is far outside.
        assert abs(counts[token] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_temperature_scales_the_distribution():
    """Catches multiplying by the temperature, or ignoring it."""
    row = logits()
    close(
        draws(SamplingParams(temperature=0.5, seed=1), row), expected(row, set(range(VOCAB)), 0.5)
    )


def test_top_k_keeps_exactly_the_k_best():
    """Catches an off-by-one in the number of candidates."""
    row = logits(1)
    keep = set(row[0].topk(3).indices.tolist())
    close(draws(SamplingParams(top_k=3, seed=2), row), expected(row, keep))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    """Catches dropping the token that crosses the threshold, or keeping one more."""
    row = logits(2)
    order = row[0].softmax(0).sort(descending=True)
    mass, keep = 0.0, set()
    for p, token in zip(order.values.tolist(), order.indices.tolist(), strict=True):
        if mass >= top_p:
            break
        keep.add(token)
        mass += p
    close(draws(SamplingParams(top_p=top_p, seed=3), row), expected(row, keep))


def test_top_p_beyond_the_partial_sort():
    """Catches a nucleus cut off at the number of candidates first looked at."""
    row = torch.zeros(1, 5000)
    assert len(draws(SamplingParams(top_p=0.9, seed=4), row, n=6000)) > 2500


def test_min_p_drops_tokens_below_a_share_of_the_best():
    """Catches comparing with an absolute probability instead of a share of the best one's."""
    row = logits(3)
    p = row[0].softmax(0)
    keep = {i for i in range(VOCAB) if p[i] >= 0.2 * p.max()}
    close(draws(SamplingParams(min_p=0.2, seed=5), row), expected(row, keep))


def test_a_seed_reproduces_whatever_the_batch():
    """Catches a generator shared between requests of a batch."""
    rows = torch.cat([logits(i) for i in range(4)])
    alone = SamplerState.of(SamplingParams(seed=7), [])
    solo = [choose(rows[1:2], [alone])[0] for _ in range(20)]
    states = [SamplerState.of(SamplingParams(seed=s), []) for s in (1, 7, None, 9)]
    assert [choose(rows, states)[1] for _ in range(20)] == solo


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    """Catches penalising the prompt, or counting a token once for frequency."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    state = SamplerState.of(params, [1, 2, 3])
    for token in (4, 4, 5):
        state.record(token)
    row = torch.zeros(VOCAB)
    changed = adjust(row, state)
    assert changed[4] == pytest.approx(-0.5 - 2 * 0.25)
    assert changed[5] == pytest.approx(-0.75)
    assert torch.count_nonzero(changed) == 2
    assert torch.count_nonzero(row) == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    """Catches subtracting, and leaving the prompt out (CTRL's penalty covers it)."""
    state = SamplerState.of(SamplingParams(repetition_penalty=2.0), [0, 1])
    state.record(2)
    changed = adjust(torch.tensor([1.0, -1.0, 3.0, 4.0]), state)
    assert changed.tolist() == [0.5, -2.0, 1.5, 4.0]


def test_logit_bias_moves_a_greedy_choice():
    """Catches applying the bias only when sampling."""
    row = logits(6)
    assert choose(
        row, [SamplerState.of(SamplingParams(temperature=0, logit_bias={7: 100}), [])]
    ) == [7]


def test_logprobs_are_the_models_own_and_ranked():
    """Catches reporting penalised or tempered probabilities, and a wrong rank."""
    row = logits(8)
    own = row[0].log_softmax(0)
    token = int(row[0].topk(5).indices[4])
    (scored,) = token_logprobs(row, [token], top=3, text=str)
    assert scored.chosen.logprob == pytest.approx(float(own[token]), abs=1e-6)
    assert scored.chosen.rank == 5
    assert [x.rank for x in scored.top] == [1, 2, 3]
    assert [x.token_id for x in scored.top] == row[0].topk(3).indices.tolist()


def test_greedy_ignores_the_generator():
    """Catches drawing a random number for a greedy request, which would shift its seed."""
    state = SamplerState.of(SamplingParams(temperature=0, seed=3), [])
    choose(logits(), [state])
    assert state.rng.random() == random.Random(3).random()

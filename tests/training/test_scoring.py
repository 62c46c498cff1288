"""Scores against naive loops, on a toy model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy_chat import toy_chat
from toys import TOYS, VOCAB

from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Plan, additive_plan
from trimtab.training.repetition import repetition
from trimtab.training.scoring import (
    Answer,
    answer_logprobs,
    answer_of,
    generate,
    perplexity,
)
from trimtab.training.steered_model import SteeredModel, batches
from trimtab.training.vectors.activations import hidden_states


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


def toy_host(name: str) -> SteeredModel:
    model = TOYS[name]()
    return SteeredModel(replace(toy_chat(), model=model), profile_model(model, model_id=name))


def plan(size: float = 3.0) -> Plan:
    row = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return additive_plan({0: row * size / row.norm()})


ANSWERS = [Answer(tuple((3 * i + 7 * j) % 90 for j in range(6 + 5 * i)), 3 + i) for i in range(5)]


def hidden_directly(host: SteeredModel, ids, row=None, layer: int = 0):
    """A forward pass with a hand-made hook, one row at a time."""
    hook = None
    if row is not None:
        hook = host.profile.layers[layer].register_forward_hook(lambda m, i, o: o + row)
    try:
        with torch.inference_mode():
            return host.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("steer", [False, True])
def test_answer_logprobs_equal_a_naive_loop(host, steer):
    """Catches padding that leaks, scores shifted by one, and steering of the wrong rows."""
    the_plan = plan() if steer else None
    row = the_plan.parts[0].layers[0].add if the_plan else None
    scores = answer_logprobs(host, ANSWERS, plan=the_plan)
    for answer, score in zip(ANSWERS, scores, strict=True):
        logprobs = hidden_directly(host, answer.ids, row).logits[0].log_softmax(-1)
        own = [
            float(logprobs[t - 1, answer.ids[t]]) for t in range(answer.n_prompt, len(answer.ids))
        ]
        assert float(score) == pytest.approx(sum(own) / len(own), abs=1e-4)


def test_a_plan_of_zero_equals_no_plan(host):
    """Catches a scale of 0 that still changes something."""
    zero = additive_plan({0: torch.zeros(32)})
    assert torch.equal(answer_logprobs(host, ANSWERS), answer_logprobs(host, ANSWERS, plan=zero))


def test_perplexity_is_the_exponential_of_the_mean_surprise(host):
    """Catches windows that share context or drop their last token."""
    ids = [(5 * i) % 90 for i in range(50)]
    total, n = 0.0, 0
    for start in (0, 20, 40):
        part = ids[start : start + 20]
        logprobs = hidden_directly(host, part).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[t - 1, part[t]]) for t in range(1, len(part)))
        n += len(part) - 1
    assert perplexity(host, ids, window=20) == pytest.approx(math.exp(total / n), rel=1e-4)


def test_generation_is_greedy_under_the_plan(host):
    """Catches a cache that misses the steering of earlier tokens."""
    row = plan().parts[0].layers[0].add
    prompt = list(range(5, 15))
    (text,) = generate(host, [prompt], 8, plan=plan())
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(hidden_directly(host, ids, row).logits[0, -1].argmax()))
    assert list(text.ids) == ids[len(prompt) :]


@pytest.mark.parametrize("name", sorted(TOYS))
def test_a_batch_generates_what_each_prompt_would_alone(name):
    """Catches a cache lost or shared, and a row that reads its neighbour, in any architecture."""
    host = toy_host(name)
    prompts = [[(5 + i + j) % VOCAB for j in range(n)] for i, n in enumerate((6, 9, 6, 6, 9))]
    for prompt, text in zip(prompts, generate(host, prompts, 6, plan=plan()), strict=True):
        ids = list(prompt)
        for _ in text.ids:
            with torch.no_grad(), host.under(plan(), n_rows=1, n_tokens=len(ids)):
                output = host.model(input_ids=torch.tensor([ids]), use_cache=False)
            ids.append(int(output.logits[0, -1].argmax()))
        assert list(text.ids) == ids[len(prompt) :]


def test_a_row_that_has_ended_stays_ended():
    """Catches tokens after the end mark, written while the batch goes on for the others."""
    loaded = toy_chat()
    host = SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))
    prompts = [[5 + i + j for j in range(6)] for i in range(4)]
    whole = generate(host, prompts, 12)
    end = whole[0].ids[2]
    loaded.model.generation_config.eos_token_id = end
    for before, after in zip(whole, generate(host, prompts, 12), strict=True):
        n = before.ids.index(end) + 1 if end in before.ids else len(before.ids)
        assert after.ids == before.ids[:n]


def test_perplexity_stays_within_the_context():
    """Catches positions past a model's last one: GPT-2 has no embedding for them."""
    host = toy_host("gpt2")
    ids = [(5 * i) % 90 for i in range(300)]
    assert host.profile.max_context == 256
    assert perplexity(host, ids) == perplexity(host, ids, window=256)


def test_a_text_of_one_token_is_refused(host):
    """Catches a score read from the last position for a token that nothing predicts."""
    with pytest.raises(DataError, match="1 tokens long"):
        answer_of(host.tokenizer, "", "g")
    assert answer_of(host.tokenizer, "", "go").n_prompt == 1


def test_hidden_states_do_not_depend_on_the_batch(host):
    """Catches a padded position read in place of the answer's, for every choice of position."""
    for position, pick in (("mean", slice(None)), ("last", slice(-1, None)), (-2, slice(-2, -1))):
        states = hidden_states(host, ANSWERS, position=position)
        for answer, state in zip(ANSWERS, states, strict=True):
            output = hidden_directly(host, answer.ids)
            own = output.hidden_states[1][0, answer.n_prompt :][pick].mean(0)
            assert torch.allclose(state[0], own, atol=1e-5)


def test_the_end_mark_is_not_read(host):
    """Catches a mean that includes the end token, the same in every answer."""
    answer = answer_of(host.tokenizer, "hello", "good day")
    assert answer.n_end == 1
    assert answer.ids[-1] == host.tokenizer.eos_token_id
    state = hidden_states(host, [answer], position="last")[0, 0]
    own = hidden_directly(host, answer.ids).hidden_states[1][0, -2]
    assert torch.allclose(state, own, atol=1e-5)


def test_batches_name_every_row_once():
    """Catches a row lost or doubled by grouping."""
    lengths = [7, 300, 2, 2048, 90, 5000, 1]
    groups = batches(lengths, max_tokens=2048)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 2048


def test_repetition_counts_repeated_trigrams():
    """Catches a measure that is blind to loops."""
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1, 2, 3] * 10) == pytest.approx(1 - 3 / 28)
    assert repetition([1]) == 0.0

"""What counts as incoherent, on a toy model; the dose search, on made-up damage."""

from __future__ import annotations

import math

import pytest
import torch
from toy_chat import toy_chat

from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import additive_plan
from trimtab.training.coherence import Coherence, Signs, largest_dose, signs_of
from trimtab.training.scoring import Generation, generate
from trimtab.training.steered_model import SteeredModel

PROMPTS = [[1, 2 + i, 3 + 2 * i] for i in range(8)]
LIMITS = Coherence(max_surprise=3.0, max_repetition=0.25, min_entropy=0.5)
FINE = {"n_tokens": 32, "surprise": 1.0, "repetition": 0.0, "entropy": 1.5}


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


@pytest.mark.parametrize(
    "bad",
    [
        {"surprise": 3.1},
        {"repetition": 0.3},
        {"entropy": 0.4},
        {"n_tokens": 0},
        {"surprise": math.inf},
    ],
)
def test_each_sign_alone_is_enough(bad):
    """A limit nothing is held to."""
    assert not LIMITS.is_incoherent(Signs(**FINE))
    assert LIMITS.is_incoherent(Signs(**{**FINE, **bad}))
    assert LIMITS.share([Signs(**FINE), Signs(**{**FINE, **bad})]) == 0.5


def test_limits_come_from_the_models_own_answers():
    """A limit far above what the model ever says passes ruins; an empty answer has no surprise."""
    greedy = [Signs(32, 0.1 * i, 0.01 * i, 1.0 + 0.1 * i) for i in range(101)]
    limits = Coherence.of([*greedy, Signs(0, math.inf, 0.0, 0.0)], quantile=0.9)
    assert limits.max_surprise == pytest.approx(9.0 + math.log(2))
    assert limits.max_repetition == 0.3
    assert limits.min_entropy == pytest.approx(0.5 * 2.0)
    with pytest.raises(DataError, match="unsteered"):
        Coherence.of([Signs(0, math.inf, 0.0, 0.0)])


def test_signs_are_read_without_the_plan_and_without_the_end_mark(host):
    """A steered model finds its own ruins unsurprising; an end mark is no word of the answer."""
    row = 40 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    steered = generate(host, PROMPTS, 12, plan=additive_plan({0: row}))
    signs = signs_of(host, PROMPTS, steered)
    with torch.inference_mode():
        for prompt, generation, sign in zip(PROMPTS, steered, signs, strict=True):
            ids = torch.tensor([[*prompt, *generation.ids]])
            scores = host.model(input_ids=ids).logits[0].float().log_softmax(-1)
            own = scores[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
            own = own[: sign.n_tokens]
            assert sign.surprise == pytest.approx(-float(own.mean()), abs=1e-5)
    (end,) = {host.tokenizer.eos_token_id}
    host.model.generation_config.eos_token_id = end
    kept, empty = signs_of(
        host, PROMPTS[:2], [Generation((5, 6, end), 1.0), Generation((end,), 1.0)]
    )
    assert kept.n_tokens == 2
    assert (empty.n_tokens, empty.surprise) == (0, math.inf)


def test_fitted_limits_pass_the_model_and_catch_a_wrecked_one(host):
    """Limits no steering can break, or that the model itself breaks."""
    limits = Coherence.fit(host, PROMPTS, n_tokens=12)
    assert limits == Coherence.fit(host, PROMPTS, n_tokens=12)
    row = 400 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    wrecked = additive_plan({0: row, 1: row})
    whole = limits.incoherent_share(host, PROMPTS, None, n_tokens=12)
    assert whole < limits.incoherent_share(host, PROMPTS, wrecked, n_tokens=12)


@pytest.mark.parametrize("knee", [0.02, 0.1, 0.5, 1.3])
def test_the_dose_found_is_just_under_the_knee(knee):
    """A search that stops short, or over the limit."""
    tried = []

    def share_at(dose: float) -> float:
        tried.append(dose)
        return 0.05 if dose <= knee else 0.06

    dose = largest_dose(share_at, low=0.01, high=2.0, n_evaluations=10)
    assert len(tried) <= 10
    assert dose <= knee <= 1.1 * dose


def test_a_dose_does_not_pass_over_a_smaller_one_that_failed():
    """Damage with a hole in it: 0.3 fails although 0.5 passes."""
    dose = largest_dose(
        lambda dose: float(0.2 < dose < 0.4 or dose > 1), low=0.1, high=4.0, n_evaluations=8
    )
    assert dose == pytest.approx(0.1)


def test_no_dose_is_zero_and_a_senseless_search_refused():
    """The smallest dose handed out although it fails as well."""
    assert largest_dose(lambda dose: 1.0, low=0.1, high=1.0) == 0.0
    assert largest_dose(lambda dose: float(dose > 0.1), low=0.1, high=1.0) == 0.1
    with pytest.raises(DataError, match="from 1 to 0"):
        largest_dose(lambda dose: 0.0, low=1.0, high=0.1)
    with pytest.raises(DataError, match="not 2"):
        largest_dose(lambda dose: 0.0, low=0.1, high=1.0, n_evaluations=2)

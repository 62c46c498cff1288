"""Building and calibrating, end to end on a toy and once on the real model."""

from __future__ import annotations

import pytest
import torch
from toy_chat import toy_chat

from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import additive_plan
from trimtab.steering.vector import from_bytes, to_bytes
from trimtab.training.calibration import SCALES, Budget, calibrate, candidate_layers
from trimtab.training.scoring import answer_logprobs, answer_of
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.descriptions import pairs_from_descriptions
from trimtab.training.vectors.pairs import Pair, PairSet, concept

QUICK = Budget(n_text_tokens=64, n_generated=6, n_prompts=2)


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


def toy_pairs(n: int = 24) -> PairSet:
    """Answers of letters early or late in the alphabet."""
    pairs = [
        Pair(f"q{i}", "abcab"[i % 3 :] * 2, "xyzxy"[i % 3 :] * 2, is_held=i % 3 == 2)
        for i in range(n)
    ]
    return PairSet("letters", tuple(pairs))


def test_a_built_vector_is_whole_and_repeatable(host):
    """Catches a build that depends on chance, or an artifact that does not survive its file."""
    pairs = toy_pairs()
    first = build_vector(host, pairs, id="early", budget=QUICK)
    again = build_vector(host, pairs, id="early", budget=QUICK)
    assert torch.equal(first.directions, again.directions)
    assert first.default_layers == again.default_layers
    loaded = from_bytes(to_bytes(first), name="early")
    assert torch.equal(loaded.directions, first.directions)
    assert loaded.calibration == first.calibration
    assert first.data["n_fit"] + first.data["n_calibration"] + first.data["n_held"] == 24
    doses = first.directions.norm(dim=1) / host.profile.hidden_norms
    assert torch.allclose(doses, doses[0].expand_as(doses), rtol=1e-4)


def test_held_pairs_change_nothing(host):
    """Catches held data leaking into the direction or the calibration."""
    pairs = toy_pairs()
    changed = PairSet(
        "letters",
        tuple(Pair(p.prompt, "k" * 9, "m" * 9, True) if p.is_held else p for p in pairs.pairs),
    )
    one, other = (build_vector(host, x, id="v", budget=QUICK) for x in (pairs, changed))
    assert torch.equal(one.directions, other.directions)


def test_calibration_chooses_a_dose_within_the_budget(host):
    """Catches a knee that breaks its own criteria without saying so."""
    pairs = toy_pairs()
    vector = build_vector(host, pairs, id="early", budget=QUICK)
    record = vector.calibration
    assert record is not None
    points = {point["scale"]: point for point in record["curve"]}
    assert set(points) == set(SCALES)
    assert points[0.0]["rise"] == 0.0
    if record["knee"]["is_clean"]:
        inner = [points[s]["margin"] for s in SCALES if abs(s) <= 1]
        assert inner == sorted(inner)
        assert points[1.0]["rise"] <= 1.5 * QUICK.max_rise + 1e-6
    best = max(record["candidates"], key=lambda c: c["effect"])
    assert list(vector.default_layers) == best["layers"]


def test_calibration_prefers_the_layer_where_the_direction_works(host):
    """Catches a choice that ignores the measured effect."""
    pairs = [
        (
            answer_of(host.tokenizer, p.prompt, p.preferred),
            answer_of(host.tokenizer, p.prompt, p.dispreferred),
        )
        for p in toy_pairs().build
    ]
    useful = build_vector(host, toy_pairs(), id="v", is_calibrated=False).directions
    noise = torch.randn(useful.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    directions = torch.stack([noise[0], useful[1]])
    chosen = calibrate(host, directions, pairs, candidates=[(0,), (1,)], budget=QUICK)
    assert chosen.layers == (1,)


def test_candidate_layers_exist_for_any_depth():
    """Catches layers past the end of a shallow model, or none at all."""
    for n_layers in (1, 2, 3, 4, 8, 30, 80):
        sets = candidate_layers(n_layers)
        assert sets
        assert all(0 <= layer < n_layers for layers in sets for layer in layers)


def test_sides_that_look_the_same_are_refused(host):
    """Catches a vector of zeros, or of NaN, stored as if it were one."""
    same = [Pair(f"q{i}", "abc", "abc ", is_held=False) for i in range(12)]
    hidden = PairSet("same", tuple(same))
    with pytest.raises(DataError, match=r"no direction|look the same"):
        build_vector(
            host,
            PairSet("x", tuple(Pair(p.prompt, "abc", "abc", False) for p in hidden.pairs)),
            id="v",
            is_calibrated=False,
        )


def test_an_answer_longer_than_the_context_is_refused(host):
    """Catches a vector read at positions the model was never trained on."""
    pairs = [Pair(f"q{i}", "a" * 600 + str(i), "b" * 600 + str(i)) for i in range(8)]
    with pytest.raises(DataError, match=r"begins 'q0' has 6\d\d tokens.* 512"):
        build_vector(host, PairSet("long", tuple(pairs)), id="v", is_calibrated=False)


def test_the_curve_of_a_known_direction_rises(host):
    """Catches a sign lost between direction, plan and margin, on a case that is known: at the last
    layer the difference of two tokens' output rows pulls the one's logit from the other's."""
    ids = [host.tokenizer(letter)["input_ids"][0] for letter in "az"]
    head = host.model.get_output_embeddings().weight.detach().float()
    last = len(host.profile.layers) - 1
    directions = (head[ids[0]] - head[ids[1]]).expand(last + 1, -1)
    pairs = [
        (answer_of(host.tokenizer, f"q{i}", "a"), answer_of(host.tokenizer, f"q{i}", "z"))
        for i in range(6)
    ]
    found = calibrate(host, directions, pairs, candidates=[(last,)], budget=QUICK)
    margins = [point["margin"] for point in found.record["curve"]]
    assert margins == sorted(margins)
    assert margins[-1] - margins[0] > 0.5
    assert all(point["moved"] == 1.0 for point in found.record["curve"] if point["scale"])


def test_descriptions_must_differ(host):
    """Catches a vector of nothing built from two equal descriptions."""
    with pytest.raises(DataError, match="the same"):
        pairs_from_descriptions(host, "warm", "warm ")
    with pytest.raises(DataError, match="characters"):
        pairs_from_descriptions(host, "", "cold")


@pytest.mark.slow
def test_a_real_concept_moves_held_answers(smollm2):
    """Catches a direction that only works on the pairs it was fitted on."""
    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    host = SteeredModel(smollm2, profile)
    whole = concept("optimistic")
    pairs = PairSet("some", (*whole.build[:16], *whole.held[:8]))
    vector = build_vector(host, pairs, id="optimistic", is_calibrated=False)
    answers = [
        answer_of(smollm2.tokenizer, pair.prompt, side)
        for pair in pairs.held
        for side in (pair.preferred, pair.dispreferred)
    ]
    margins = []
    for scale in (-1.0, 0.0, 1.0):
        rows = {layer: vector.row(layer) * scale for layer in vector.default_layers}
        scores = answer_logprobs(host, answers, plan=additive_plan(rows))
        margins.append(scores[0::2] - scores[1::2])
    assert margins[0].mean() < margins[1].mean() < margins[2].mean()
    assert (margins[2] > margins[1]).float().mean() >= 0.8

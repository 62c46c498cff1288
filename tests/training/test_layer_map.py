"""The map of layers and scales: what a request at a cell would do, and equal to the curve."""

from __future__ import annotations

import math

import pytest
from toy_chat import toy_chat

from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import additive_plan
from trimtab.steering.vector import from_bytes, to_bytes
from trimtab.training.calibration import Budget, candidate_layers
from trimtab.training.layer_map import MAP_SCALES, MOST_SINGLES, layer_map, mapped_layers
from trimtab.training.scoring import answer_logprobs, answer_of, perplexity
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.neutral import neutral_text
from trimtab.training.vectors.pairs import Pair, PairSet

QUICK = Budget(n_text_tokens=64, n_generated=6, n_prompts=2)


def letters(n: int) -> PairSet:
    """Answers of letters early or late in the alphabet, no two pairs the same."""
    pairs = [
        Pair(f"q{i}", "abcde"[i % 4 :] + "ab" * (i % 3), "vwxyz"[i % 4 :] + "yx" * (i % 3))
        for i in range(n)
    ]
    return PairSet("letters", tuple(pairs))


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


@pytest.fixture(scope="module")
def few(host):
    """Built from so few pairs that the map and the curve measure the same ones."""
    return build_vector(host, letters(24), id="early", budget=QUICK, is_mapped=True)


@pytest.fixture(scope="module")
def many(host):
    """Built from pairs of which the curve measures more than the map does."""
    return build_vector(host, letters(56), id="early", budget=QUICK, is_mapped=True)


def chosen_row(vector, name: str) -> dict[float, float]:
    """A map's row of the vector's own layers, by scale."""
    found = vector.calibration["map"]
    row = found["layers"].index(list(vector.default_layers))
    return dict(zip(found["scales"], found[name][row], strict=True))


def test_a_map_is_made_when_asked_for_and_changes_nothing_else(host, few):
    """Catches a map that everybody pays for, or one that moves the choice it is to explain."""
    plain = build_vector(host, letters(24), id="early", budget=QUICK)
    assert plain.calibration is not None
    assert "map" not in plain.calibration
    assert plain.digest == few.digest
    assert plain.calibration == {k: v for k, v in few.calibration.items() if k != "map"}


def test_every_layer_set_has_a_number_at_every_scale(few):
    """Catches a grid with a row or a column too few, or layers that nobody can name."""
    found = few.calibration["map"]
    assert found["scales"] == list(MAP_SCALES)
    assert found["dose"] == few.calibration["knee"]["dose"]
    assert [0] in found["layers"] or [1] in found["layers"]
    for name in ("effect", "rise"):
        assert len(found[name]) == len(found["layers"])
        assert {len(row) for row in found[name]} == {len(MAP_SCALES)}


@pytest.mark.parametrize("built", ["few", "many"])
def test_damage_of_the_chosen_layers_is_the_curves(built, request):
    """Catches another text, dose or norm below the map than below the curve: there the text is the
    same whatever the pairs, so the numbers are equal and not just near."""
    vector = request.getfixturevalue(built)
    rises = {point["scale"]: point["rise"] for point in vector.calibration["curve"]}
    assert chosen_row(vector, "rise") == {scale: rises[scale] for scale in MAP_SCALES}
    assert rises[4.0] != rises[1.0]


def test_effect_of_the_chosen_layers_is_the_curves_where_the_pairs_are(few):
    """Catches an effect of another sign, base or unit than the curve's. The curve keeps margins,
    each rounded to five places, so their difference may be off by one in the last."""
    assert few.calibration["n_pairs"] == few.calibration["map"]["n_pairs"]
    margins = {point["scale"]: point["margin"] for point in few.calibration["curve"]}
    effects = chosen_row(few, "effect")
    for scale in MAP_SCALES:
        assert effects[scale] == pytest.approx(margins[scale] - margins[0.0], abs=2e-5)
    assert abs(effects[1.0]) > 1e-3  # else the sign would be nobody's


def test_each_cell_is_what_a_request_for_these_layers_would_do(host, many):
    """Catches a cell measured at another layer or dose than the stored rows have, and one measured
    on other pairs than those used for choosing."""
    found = many.calibration["map"]
    assert many.calibration["n_pairs"] > found["n_pairs"] == 8
    _, pairs = letters(56).fit_and_calibration()
    answers = [
        answer_of(host.tokenizer, pair.prompt, text)
        for pair in pairs[:8]
        for text in (pair.preferred, pair.dispreferred)
    ]
    ids = host.tokenizer(neutral_text())["input_ids"][: QUICK.n_text_tokens]

    def margin(plan) -> float:
        scores = answer_logprobs(host, answers, plan=plan)
        return float((scores[0::2] - scores[1::2]).mean())

    for row, layers in enumerate(found["layers"]):
        for column, scale in enumerate(found["scales"]):
            plan = additive_plan({layer: many.row(layer) * scale for layer in layers})
            assert found["effect"][row][column] == pytest.approx(
                margin(plan) - margin(None), abs=1e-4
            )
            rise = perplexity(host, ids, plan=plan) / perplexity(host, ids) - 1
            assert found["rise"][row][column] == pytest.approx(rise, abs=1e-4, rel=1e-4)


def test_a_map_survives_its_file(few):
    """Catches a map that the reader drops or changes."""
    assert from_bytes(to_bytes(few), name="early").calibration == few.calibration


def test_a_map_without_calibration_is_refused(host):
    """Catches a map in units of a dose that nobody chose."""
    with pytest.raises(DataError, match="without calibration") as caught:
        build_vector(host, letters(24), id="v", is_calibrated=False, is_mapped=True)
    assert caught.value.param == "is_mapped"


@pytest.mark.parametrize("n_layers", [1, 2, 4, 30, 80, 200])
def test_mapped_layers_are_few_and_spread(n_layers):
    """Catches a deep model whose map takes hours, or one that shows only its first layers."""
    sets = candidate_layers(n_layers)
    singles = [layers for layers in sets if len(layers) == 1]
    for chosen in (sets[0], sets[-1], singles[len(singles) // 2]):
        found = mapped_layers(sets, chosen)
        assert len(found) == len(set(found)) <= MOST_SINGLES + 1
        assert chosen in found
        assert {singles[0], singles[-1]} <= set(found)
        assert set(found) - {chosen} <= set(singles)


def test_the_chosen_run_is_named_once_and_last():
    """Catches the chosen layers twice in one map, or lost among the single ones."""
    assert mapped_layers([(3,), (1,), (1, 2)], (1, 2)) == [(1,), (3,), (1, 2)]
    assert mapped_layers([(3,), (1,), (1, 2)], (3,)) == [(1,), (3,)]


def test_what_is_not_a_number_is_none():
    """Catches a broken cell that makes the whole artifact unwritable: a header is finite."""
    found = layer_map(lambda layers, dose: (math.nan, math.inf), [(0,)], dose=0.1)
    assert found["effect"] == found["rise"] == [[None] * len(MAP_SCALES)]


def test_progress_counts_cells():
    """Catches a bar that never fills."""
    seen: list[tuple[str, int, int]] = []
    layer_map(
        lambda layers, dose: (dose, 0.0), [(0,), (1,)], dose=0.1, progress=lambda *a: seen.append(a)
    )
    n = 2 * len(MAP_SCALES)
    assert seen == [("mapping layers and scales", i + 1, n) for i in range(n)]

"""Training a classifier: the fit of one layer, its measures, and the whole on a toy model."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from toy_chat import toy_chat

from trimtab.kernels import probabilities, read
from trimtab.steering.classifier import from_bytes, to_bytes
from trimtab.steering.errors import DataError
from trimtab.steering.model.hooks import captured
from trimtab.steering.model.profile import profile_model
from trimtab.training.classifiers import fit as fitting
from trimtab.training.classifiers.build import (
    best_layer,
    build_classifier,
    guided_layers,
    sweep,
)
from trimtab.training.classifiers.evaluate import measure_classifier
from trimtab.training.classifiers.examples import Example, ExampleSet, tokens_of
from trimtab.training.classifiers.fit import (
    Labelled,
    Recipe,
    fit_network,
    folded,
    forward,
    loss_of,
    standardisation,
)
from trimtab.training.classifiers.metrics import calibration_error, measures
from trimtab.training.classifiers.own_answers import own_answers
from trimtab.training.classifiers.probability_calibration import calibrated
from trimtab.training.classifiers.states import read_rows, tokens_read
from trimtab.training.scoring import Answer, generate
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.pairs import concept

LETTERS = {"early": "abcab", "middle": "mnomn", "late": "xyzxy"}


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


def letters(n: int = 20, labels: tuple[str, ...] = ("early", "middle", "late")) -> ExampleSet:
    """Answers of letters from one part of the alphabet, each question with an answer of each."""
    return ExampleSet(
        "letters",
        tuple(
            Example((("user", f"q{i}"),), LETTERS[label][i % 3 :] * 2, (label,), f"q{i}")
            for i in range(n)
            for label in labels
        ),
    )


def clouds(n: int, *, noise: float, seed: int, is_exclusive: bool = True) -> Labelled:
    """Points around one centre a label, of very unequal spread and far from zero."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 12, generator=torch.Generator().manual_seed(9))
    if is_exclusive:
        targets = torch.nn.functional.one_hot(torch.arange(n) % 3, 3).float()
    else:
        targets = (torch.rand(n, 3, generator=generator) < 0.4).float()
    states = targets @ centres + noise * torch.randn(n, 12, generator=generator)
    return Labelled(states * torch.logspace(-1, 2, 12) + 5.0, targets)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_folding_changes_nothing(kind):
    """Catches a network that in raw hidden states is another function than the one trained."""
    generator = torch.Generator().manual_seed(0)
    widths = [12, 3] if kind == "linear" else [12, 16, 16, 3]
    layers = [
        (torch.randn(b, a, generator=generator) / a**0.5, torch.randn(b, generator=generator))
        for a, b in pairwise(widths)
    ]
    states = clouds(50, noise=1.0, seed=1).states
    mean, deviation = standardisation(states, scales_each=True)
    scale, offset = torch.tensor([0.5, 2.0, 1.5]), torch.tensor([1.0, -1.0, 0.0])
    expected = forward(layers, (states - mean) / deviation) * scale + offset
    found = forward(folded(layers, mean, deviation, scale, offset), states)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_standardising_an_input_that_never_varies():
    """Catches a division by a deviation of zero, or of next to nothing."""
    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    states[:, 0] = 3.0
    states[:, 1] *= 1e-9
    mean, deviation = standardisation(states, scales_each=True)
    assert float(mean[0]) == 3.0
    assert float(deviation.min()) > 1e-3


@pytest.mark.parametrize("is_exclusive", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_separable_toy_is_learned(kind, is_exclusive):
    """Catches a loss of the wrong sign, labels in another order, or training without effect."""
    fit, validation, held = (
        clouds(n, noise=0.05, seed=s, is_exclusive=is_exclusive)
        for s, n in enumerate((240, 90, 90))
    )
    recipe = Recipe(kind=kind, is_exclusive=is_exclusive, hidden=16, learning_rate=1e-2, noise=0.0)
    logits = forward(fit_network(fit, validation, recipe).layers, held.states)
    found = logits.softmax(1) if is_exclusive else logits.sigmoid()
    scores = measures(found, held.targets, labels="abc", is_exclusive=is_exclusive)
    assert scores["accuracy"] == 1.0
    assert scores["macro_f1"] == 1.0
    assert set(scores["auroc"].values()) == {1.0}


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_calibration_makes_overconfident_logits_honest(is_exclusive):
    """Catches a temperature applied the wrong way round: the error on held rows would grow."""
    generator = torch.Generator().manual_seed(3)
    honest = 1.5 * torch.randn(3000, 3, generator=generator)
    if is_exclusive:
        drawn = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
        targets = torch.nn.functional.one_hot(drawn, 3).float()
    else:
        targets = (torch.rand(3000, 3, generator=generator) < honest.sigmoid()).float()
    claimed = 4.0 * honest if is_exclusive else 4.0 * honest + torch.tensor([2.0, -2.0, 0.0])
    scale, offset = calibrated(claimed[:1500], targets[:1500], is_exclusive=is_exclusive)
    assert torch.allclose(scale, torch.full((3,), 0.25), rtol=0.2)

    def error(logits: torch.Tensor) -> float:
        p = logits.softmax(1) if is_exclusive else logits.sigmoid()
        return measures(p, targets[1500:], labels="abc", is_exclusive=is_exclusive)["ece"]

    assert error(claimed[1500:] * scale + offset) < 0.25 * error(claimed[1500:])


def test_calibration_survives_perfect_and_missing_labels():
    """Catches infinite logits where validation rows are told apart without a mistake."""
    logits = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0]]).repeat(10, 1)
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(10, 1)
    scale, _ = calibrated(logits, targets, is_exclusive=True)
    assert 0.3 < float(scale[0]) < 3
    scale, offset = calibrated(logits, targets, is_exclusive=False)
    assert float(scale.min()) > 0.3
    assert float(scale.max()) < 3
    assert float(offset.abs().max()) < 3
    assert (float(scale[2]), float(offset[2])) == (1.0, 0.0)  # a label that no row has


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_calibration_does_no_harm_to_a_trained_network(is_exclusive, monkeypatch):
    """Catches a calibration folded into the wrong layer, or into the rows of other labels."""
    raw = (torch.ones(3), torch.zeros(3))
    recipe = Recipe(is_exclusive=is_exclusive, hidden=64, learning_rate=3e-3)
    change = np.zeros(2)
    for seed in range(3):
        fit, validation, held = (
            clouds(n, noise=1.5, seed=10 * seed + k, is_exclusive=is_exclusive)
            for k, n in enumerate((150, 1500, 1500))
        )
        for sign in (1, -1):
            with monkeypatch.context() as patch:
                if sign < 0:
                    patch.setattr(fitting, "calibrated", lambda *args, **options: raw)
                logits = forward(fit_network(fit, validation, recipe).layers, held.states)
            p = logits.softmax(1) if is_exclusive else logits.sigmoid()
            scores = measures(p, held.targets, labels="abc", is_exclusive=is_exclusive)
            change += sign * np.array([scores["ece"], scores["log_loss"]]) / 3
    assert change[0] < 0.002
    assert change[1] < 0.002


def test_training_stops_early_with_the_best_weights():
    """Catches the last weights being kept instead of the best, on data that can be memorised."""
    fit = clouds(60, noise=3.0, seed=0)
    validation = clouds(300, noise=3.0, seed=1)
    recipe = Recipe(hidden=64, learning_rate=1e-2, max_epochs=60, patience=5)
    best = fit_network(fit, validation, recipe)
    assert best.n_epochs < 55
    cut = fit_network(fit, validation, Recipe(**{**vars(recipe), "max_epochs": best.n_epochs}))
    assert all(
        torch.equal(a, b)
        for one, other in zip(best.layers, cut.layers, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_validation_loss_is_that_of_the_returned_network():
    """Catches a layer chosen by the loss of another network than the one that is kept."""
    fit, validation = clouds(150, noise=1.0, seed=0), clouds(90, noise=1.0, seed=1)
    fitted = fit_network(fit, validation, Recipe(hidden=16))
    logits = forward(fitted.layers, validation.states)
    loss = loss_of(logits, validation.targets, is_exclusive=True)
    assert math.isclose(fitted.validation_loss, float(loss), rel_tol=1e-4)


def test_measures_against_numbers_worked_out_by_hand():
    """Catches truth and reading swapped, or a bin at the edge counted twice."""
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    scores = measures(p, y, labels=("x", "y"), is_exclusive=True)
    assert scores["accuracy"] == 0.75
    assert scores["confusion"] == [[1, 0], [1, 2]]
    assert scores["auroc"] == {"x": 1.0, "y": 1.0}
    logs = [math.log(v) for v in (0.9, 0.4, 0.7, 0.8)]
    assert math.isclose(scores["log_loss"], -sum(logs) / 4, abs_tol=1e-5)
    assert math.isclose(scores["macro_f1"], (2 / 3 + 0.8) / 2, abs_tol=1e-5)
    # 0.6 and 0.7 share a bin: 1.3 claimed, one right.
    assert math.isclose(scores["ece"], (0.1 + 0.3 + 0.2) / 4, abs_tol=1e-5)
    many = measures(p, y, labels=("x", "y"), is_exclusive=False)
    assert many["counts"]["x"] == {"tp": 1, "fp": 1, "fn": 0, "tn": 2}
    assert (many["accuracy"], many["exact_match"]) == (0.75, 0.75)
    one_sided = measures(p[:1], y[:1], labels=("x", "y"), is_exclusive=True)
    assert one_sided["auroc"] == {"x": None, "y": None}
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


def test_places_of_the_tokens():
    """Catches an end mark that is read, a long answer's end left out, or a place out of range."""
    ids = tuple(range(100))
    answer = Answer(ids[:10], 4, n_end=1)
    assert tokens_read(answer, "last") == [8]
    assert tokens_read(answer, "answer") == [4, 5, 6, 7, 8]
    assert tokens_read(answer, "both") == [3, 4, 5, 6, 7, 8]
    assert tokens_read(Answer(ids[:4], 4), "last") == [3]
    assert tokens_read(Answer(ids[:4], 1), "both") == [1, 2, 3]
    spaced = tokens_read(Answer(ids, 4), "answer", most=16)
    assert len(set(spaced)) == 16
    assert spaced[-1] == 99
    assert set(np.diff(spaced)) == {6}
    with pytest.raises(DataError, match="use 'last'"):
        tokens_read(Answer(ids[:4], 4), "both")


def test_rows_are_the_outputs_of_the_blocks_that_are_steered(host):
    """Catches the published off-by-one, rows of a neighbour in the batch, or a padded token."""
    answers = [Answer(tuple(range(5, 5 + n)), 2) for n in (9, 4, 6)]
    places = [[8], [2, 3], [5]]
    rows = read_rows(host, answers, places, layers=[1])
    assert rows.owner.tolist() == [0, 1, 1, 2]
    at = 0
    for answer, wanted in zip(answers, places, strict=True):
        with torch.no_grad(), captured(host.profile.layers, [1]) as states:
            host.model(input_ids=torch.tensor([answer.ids]), use_cache=False)
        for place in wanted:
            assert torch.allclose(rows.states[at, 0], states[1][0, place], atol=1e-5)
            at += 1


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_built_classifier_is_whole_and_repeatable(host, kind):
    """Catches training by chance, or an artifact that does not survive its file."""
    options: dict[str, Any] = {"id": "tone", "kind": kind, "hidden": 16, "seed": 3}
    first = build_classifier(host, letters(), **options)
    again = build_classifier(host, letters(), **options)
    assert first.digest == again.digest
    assert first.metrics == again.metrics
    assert build_classifier(host, letters(), **{**options, "seed": 4}).digest != first.digest
    loaded = from_bytes(to_bytes(first), name="tone")
    assert loaded.digest == first.digest
    assert loaded.metrics == first.metrics
    assert first.labels == ("early", "late", "middle")
    assert first.layers == sweep(2) == (0, 1)
    assert [first.data[f"n_{side}"] for side in ("fit", "validation", "held")] == [36, 12, 12]
    for layer in first.layers:
        assert first.metrics[str(layer)]["accuracy"] == 1.0
        assert np.trace(first.metrics[str(layer)]["confusion"]) == 12
    losses = {layer: first.metrics[str(layer)]["validation_loss"] for layer in first.layers}
    assert first.probe_layer == best_layer(losses, 2)
    assert first.default_layers == (0, 1)


def test_its_networks_are_each_their_own_layers(host):
    """Catches networks filed under another layer, or one measured and another one kept."""
    one = build_classifier(host, letters(), id="tone", hidden=16)
    for layer in one.layers:
        only = build_classifier(host, letters(), id="tone", hidden=16, layers=[layer])
        assert torch.equal(only.at(layer).w_in, one.at(layer).w_in)
    kept = build_classifier(host, letters(), id="tone", hidden=16, keep=[0])
    assert kept.layers == kept.default_layers == (0,)
    assert set(kept.metrics) == {"0", "1"}
    assert torch.equal(kept.at(0).w_in, one.at(0).w_in)


def test_layers_in_several_passes_are_the_same(host, monkeypatch):
    """Catches rows that change, or are lost, when memory does not hold all layers at once."""
    together = build_classifier(host, letters(), id="tone", hidden=16)
    bound = "trimtab.training.classifiers.states.MAX_STATE_BYTES"
    monkeypatch.setattr(bound, 4 * 60 * host.profile.ref.hidden_size)
    assert build_classifier(host, letters(), id="tone", hidden=16).digest == together.digest
    monkeypatch.setattr(bound, 1000)
    with pytest.raises(DataError, match="give fewer texts"):
        build_classifier(host, letters(), id="tone", hidden=16)


def test_held_rows_change_no_weight(host):
    """Catches held labels or texts that reach the fit, the early stop or the calibration."""
    data = letters()
    held = data.split(seed=0).held
    poisoned = tuple(
        Example(e.prompt, "kkk" + e.answer, ("early",), e.group) if i in held else e
        for i, e in enumerate(data.examples)
    )
    one, other = (
        build_classifier(host, x, id="tone", hidden=16)
        for x in (data, ExampleSet("letters", poisoned))
    )
    assert one.digest == other.digest
    assert one.metrics != other.metrics


def test_several_labels_a_text(host):
    """Catches labels that exclude one another where they should not."""
    rows = []
    for i in range(60):
        has = (i % 2 == 0, i % 3 == 0)
        text = ("ab" if has[0] else "mn") * 2 + f" q{i} " + ("z!" if has[1] else "no") * 3
        labels = tuple(label for label, is_there in zip("ez", has, strict=True) if is_there)
        rows.append(Example("", text, labels, f"q{i}"))
    made = build_classifier(
        host, ExampleSet("pairs", tuple(rows)), id="many", hidden=32, is_exclusive=False
    )
    assert not made.is_exclusive
    scores = made.metrics[str(made.probe_layer)]
    assert scores["auroc"]["z"] == 1.0
    assert sum(scores["counts"]["z"].values()) == scores["n"]
    both = read(torch.randn(5, made.model.hidden_size), made.at(made.layers[0]))
    p = probabilities(both, made.at(made.layers[0]))
    assert not torch.allclose(p.sum(1), torch.ones(5))


@pytest.mark.parametrize("position", ["answer", "both"])
def test_several_rows_a_text(host, position):
    """Catches rows that get the label of another text."""
    made = build_classifier(host, letters(), id="tone", hidden=32, position=position)
    last = made.metrics["1"]
    # A prompt's last token is the same whatever its answer: one row in eight can only be guessed.
    assert last["accuracy"] > (0.95 if position == "answer" else 0.8)
    assert last["n"] > made.data["n_held"]
    assert len({sum(row) for row in last["confusion"]}) == 1  # answers of one question are as long
    assert made.settings["position"] == position


def test_prompts_alone_are_read_where_the_answer_would_begin(host):
    """Catches instructions whose state is read before the template's end."""
    rows = [
        Example((("user", f"{letter * 9}\nq{i}"),), "", (letter,), f"q{i}")
        for i in range(20)
        for letter in "az"
    ]
    made = build_classifier(host, ExampleSet("styles", tuple(rows)), id="styles", hidden=32)
    assert made.metrics[str(made.probe_layer)]["accuracy"] > 0.8
    with pytest.raises(DataError, match="prompt without an answer"):
        build_classifier(host, ExampleSet("styles", tuple(rows)), id="x", position="answer")


def test_measuring_again(host):
    """Catches measures of a stored classifier on the rows it learned from, or of other labels."""
    data = letters()
    made = build_classifier(host, data, id="tone", hidden=16)
    same = measure_classifier(host, made, data)
    for layer in ("0", "1"):
        assert same[layer]["n"] == 12  # the held ones alone
        assert same[layer] == {key: made.metrics[layer][key] for key in same[layer]}
    swapped = {"early": "late", "late": "early", "middle": "middle"}
    lies = ExampleSet(
        "lies",
        tuple(Example(e.prompt, e.answer, (swapped[e.labels[0]],), e.group) for e in data.examples),
    )
    other = measure_classifier(host, made, lies, layers=[1])
    assert set(other) == {"1"}
    assert other["1"]["n"] == 60
    assert math.isclose(other["1"]["accuracy"], 1 / 3, abs_tol=1e-6)
    strange = ExampleSet("strange", (Example("", "abc", ("new",), "g"),))
    with pytest.raises(DataError, match="new, which classifier 'tone' does not know"):
        measure_classifier(host, made, strange)
    with pytest.raises(DataError, match=r"reads layers \[0, 1\]"):
        measure_classifier(host, made, data, layers=[7])


def test_what_cannot_be_built_is_refused(host):
    """Catches a layer that is dropped unsaid, or a network that is trained and then not stored."""
    for options, problem in (
        ({"layers": [2]}, r"no layer \[2\]"),
        ({"layers": [-1]}, r"no layer \[-1\]"),
        ({"keep": [5]}, r"not among those to train"),
        ({"hidden": 0}, "1 to 1024"),
        ({"kind": "deep"}, "not known"),
    ):
        with pytest.raises(DataError, match=problem):
            build_classifier(host, letters(), id="x", **options)


def test_progress_reaches_its_end(host):
    """Catches a bar that stops short, runs backwards or starts again."""
    seen: dict[str, list[tuple[int, int]]] = {}
    build_classifier(
        host,
        letters(),
        id="tone",
        hidden=16,
        progress=lambda name, done, total: seen.setdefault(name, []).append((done, total)),
    )
    assert set(seen) == {"reading hidden states", "training"}
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1]


def test_guided_layers_are_the_middle_ones():
    """The layer that reads best is often the last, where steering only breaks text."""
    assert guided_layers((7, 10, 13, 16, 19, 22, 25, 28), 30) == (13, 16, 19)
    assert guided_layers((3, 4), 30) == (3, 4)
    assert guided_layers((29,), 30) == (29,)


def test_the_best_layer():
    """Catches a choice by chance among equals, or one that ignores a clear difference."""
    assert best_layer({7: 0.5, 17: 0.3, 22: 0.1}, 30) == 22
    assert best_layer({7: 0.00001, 16: 0.0001, 28: 0.003}, 30) == 16
    assert best_layer({7: 0.2, 16: 0.1, 28: 0.1005}, 30) == 16


@pytest.mark.slow
def test_the_real_model_tells_optimists_from_pessimists(smollm2):
    """Catches states of another place or layer than the text's, which a toy may not show."""
    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    rows = [
        Example((("user", pair.prompt),), text, (label,), pair.prompt)
        for pair in concept("optimistic").build[:40]
        for label, text in (("hope", pair.preferred), ("doom", pair.dispreferred))
    ]
    made = build_classifier(
        SteeredModel(smollm2, profile), ExampleSet("some", tuple(rows)), id="x", layers=[5, 15]
    )
    assert made.metrics["15"]["auroc"]["hope"] > 0.9


def test_the_sweep_fits_any_depth():
    """Catches layers past the end of a shallow model, twice the same, or none at all."""
    for n_layers in (1, 2, 3, 8, 30, 80):
        layers = sweep(n_layers)
        assert layers == tuple(sorted(set(layers)))
        assert 1 <= len(layers) <= 8
        assert all(0 <= layer < n_layers for layer in layers)
    assert sweep(30)[0] == 7
    assert sweep(30)[-1] == 28


def test_own_answers_are_read_behind_the_bare_question(host: SteeredModel) -> None:
    """An instruction left in the prompt is what the classifier then reads, not the answer."""
    asked = tuple(
        Example((("user", f"{label}!\nq{i}"),), "", (label,), group=f"q{i}", is_held=i == 0)
        for i in range(3)
        for label in ("SHOUT", "whisper")
    )
    told: list[tuple[int, int]] = []
    made = own_answers(
        host, ExampleSet("asked", asked), n_tokens=6, progress=lambda *x: told.append(x)
    )
    assert told[-1] == (6, 6)
    assert [e.prompt for e in made.examples] == [(("user", e.group),) for e in made.examples]
    assert {(e.group, *e.labels, e.is_held) for e in made.examples} <= {
        (e.group, *e.labels, e.is_held) for e in asked
    }
    assert len(made.examples) + made.skipped.get("an empty answer", 0) == 6
    first = made.examples[0]
    prompt = tokens_of(host.tokenizer, asked[0], max_context=256).ids
    (again,) = generate(host, [prompt], 6)
    assert first.answer == host.tokenizer.decode(again.ids, skip_special_tokens=True).strip()


def test_noise_smooths_and_is_drawn_from_the_seed():
    """Noise from the global generator makes two trainings of one seed differ."""
    fit, validation = clouds(60, noise=0.3, seed=1), clouds(40, noise=0.3, seed=2)

    def weights(**changes: Any) -> torch.Tensor:
        recipe = Recipe(hidden=16, max_epochs=5, **changes)
        return fit_network(fit, validation, recipe).layers[0][0]

    assert torch.equal(weights(noise=1.0), weights(noise=1.0))
    assert not torch.equal(weights(noise=1.0), weights(noise=0.0))
    assert not torch.equal(weights(scales_each=True), weights(scales_each=False))
    with pytest.raises(DataError, match="deviation"):
        Recipe(noise=-1.0)

"""One forward pass's steering: the right tokens, the right gates, and the laws of each term."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_shelf import N_LAYERS, SHELF, WIDTH, compiled, drawn, passed, requested

from trimtab.steering.bank import Bank
from trimtab.steering.steered_request import Counts, SteeredRequest
from trimtab.steering.step import Span, SteerStep


@pytest.fixture
def bank() -> Bank:
    return Bank(n_layers=N_LAYERS, hidden_size=WIDTH)


def unit(name: str, layer: int = 1) -> torch.Tensor:
    row = SHELF.vector(name).row(layer).double()
    return row / row.norm()


def along(hidden: torch.Tensor, name: str, layer: int = 1) -> torch.Tensor:
    return hidden.double() @ unit(name, layer)


# --- what terms do


def test_scale_0_is_unsteered(bank: Bank) -> None:
    """A zero row that is added, or a norm that is restored, is not bit-identical in half types."""
    hidden = drawn(1, 5, WIDTH).bfloat16()
    request = requested(bank, {"vectors": [{"id": "a", "scale": 0, "normalize": True}]}, n_prompt=5)
    step = SteerStep(bank, [Span(5, 0, request)])
    assert not step.layers
    assert step.apply(1, hidden) is hidden


def test_a_term_and_its_opposite_cancel(bank: Bank) -> None:
    """Terms rounded apart before they are summed leave a residue that grows with the scale."""
    hidden = drawn(1, 5, WIDTH)
    both = requested(bank, "37.1 a - 37.1 a", n_prompt=5)
    assert torch.equal(passed(SteerStep(bank, [Span(5, 0, both)]), hidden), hidden)
    there = requested(bank, "a", n_prompt=5)
    back = requested(bank, "-a", n_prompt=5)
    away = passed(SteerStep(bank, [Span(5, 0, there)]), hidden)
    again = passed(SteerStep(bank, [Span(5, 0, back)]), away)
    assert not torch.allclose(away, hidden, atol=1e-2)
    assert torch.allclose(again, hidden, atol=1e-6)


def test_twenty_times_a_vector_is_scale_20(bank: Bank) -> None:
    """A scale applied twice, or to the unit direction, is off by a factor."""
    hidden = drawn(1, 5, WIDTH)
    once = requested(bank, "20 a", n_prompt=5)
    often = requested(bank, " + ".join(["a"] * 20), n_prompt=5)
    one = passed(SteerStep(bank, [Span(5, 0, once)]), hidden)
    assert torch.allclose(one, passed(SteerStep(bank, [Span(5, 0, often)]), hidden), atol=1e-5)
    assert torch.allclose(one - hidden, 20 * SHELF.vector("a").row(1).expand(5, -1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_batch_mates_are_untouched(bank: Bank, dtype: torch.dtype) -> None:
    """Steering that leaks into the next request of the batch is the worst a server can do."""
    hidden = drawn(1, 12, WIDTH).to(dtype)
    loud = {"vectors": [{"id": "a", "scale": 5, "normalize": True}], "ablate": [{"id": "b"}]}
    request = requested(bank, loud, n_prompt=4)
    other = requested(bank, "2 c", n_prompt=4)
    spans = [Span(4), Span(4, 0, request), Span(4, 0, other)]
    got = passed(SteerStep(bank, spans), hidden)
    assert torch.equal(got[:4], hidden[:4])
    assert not torch.equal(got[4:8], hidden[4:8])
    alone = passed(SteerStep(bank, [Span(8), Span(4, 0, other)]), hidden)
    assert torch.equal(got[8:], alone[8:])


def test_norm_is_preserved(bank: Bank) -> None:
    """Norm preservation over the sequence keeps the sum of the norms and lets a token explode."""
    hidden = drawn(1, 6, WIDTH) * torch.logspace(-1, 2, 6).unsqueeze(1)
    request = requested(bank, {"vectors": [{"id": "a", "scale": 3, "normalize": True}]}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, request)]), hidden)
    before, after = hidden.double().norm(dim=1), got.double().norm(dim=1)
    assert float(((after - before) / before).abs().max()) <= 1e-6
    assert not torch.allclose(got, hidden)


def test_ablation_removes_the_component_and_nothing_else(bank: Bank) -> None:
    """A direction that is not of unit length removes too much or too little."""
    hidden = drawn(1, 6, WIDTH)
    request = requested(bank, {"ablate": [{"id": "a", "layers": [1]}]}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, request)]), hidden)
    assert float(along(got, "a").abs().max()) <= 1e-6
    expected = hidden.double() - along(hidden, "a").unsqueeze(1) * unit("a")
    assert torch.allclose(got.double(), expected, atol=1e-6)
    halved = requested(bank, {"ablate": [{"id": "a", "scale": 0.5, "layers": [1]}]}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, halved)]), hidden)
    assert torch.allclose(along(got, "a"), along(hidden, "a") / 2, atol=1e-6)
    mirrored = requested(bank, {"ablate": [{"id": "a", "scale": 2, "layers": [1]}]}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, mirrored)]), hidden)
    assert torch.allclose(along(got, "a"), -along(hidden, "a"), atol=1e-6)


def test_two_ablations_remove_the_span(bank: Bank) -> None:
    """Subtracting two oblique projections leaves a part of both directions behind."""
    hidden = drawn(1, 6, WIDTH)
    terms = [{"id": name, "layers": [1]} for name in "ab"]
    assert abs(float(unit("a") @ unit("b"))) > 0.3  # they are not orthogonal
    request = requested(bank, {"ablate": terms}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, request)]), hidden)
    assert float(along(got, "a").abs().max()) <= 1e-6
    assert float(along(got, "b").abs().max()) <= 1e-6
    basis = torch.linalg.qr(torch.stack([unit("a"), unit("b")]).T).Q
    expected = hidden.double() - hidden.double() @ basis @ basis.T
    assert torch.allclose(got.double(), expected, atol=1e-6)


def test_nearly_equal_directions_are_ablated_as_one(bank: Bank) -> None:
    """A pseudo-inverse of two directions 1e-6 apart has entries of 1e6: float32 noise for text."""
    hidden = drawn(1, 6, WIDTH)
    terms = [{"id": name, "layers": [1]} for name in ("a", "near")]
    request = requested(bank, {"ablate": terms}, n_prompt=6)
    got = passed(SteerStep(bank, [Span(6, 0, request)]), hidden)
    expected = hidden.double() - along(hidden, "a").unsqueeze(1) * unit("a")
    assert torch.allclose(got.double(), expected, atol=1e-4)


def test_to_sets_the_component(bank: Bank) -> None:
    """A target added along an oblique direction moves the other component off its own target."""
    hidden = drawn(1, 6, WIDTH)

    def at(**targets: float) -> torch.Tensor:
        terms = [{"id": name, "to": to, "layers": [1]} for name, to in targets.items()]
        request = requested(bank, {"ablate": terms}, n_prompt=6)
        return passed(SteerStep(bank, [Span(6, 0, request)]), hidden)

    def target(name: str, to: float) -> torch.Tensor:
        return torch.full((6,), to * float(SHELF.vector(name).row(1).norm()), dtype=torch.float64)

    assert torch.allclose(along(at(a=0.5), "a"), target("a", 0.5), atol=1e-5)
    got = at(a=0.5, b=-1.5)
    assert torch.allclose(along(got, "a"), target("a", 0.5), atol=1e-5)
    assert torch.allclose(along(got, "b"), target("b", -1.5), atol=1e-5)
    got = at(a=0.0, b=2.0)
    assert torch.allclose(along(got, "a"), target("a", 0.0), atol=1e-5)


# --- which tokens


APPLIES = st.fixed_dictionaries(
    {"prompt": st.booleans(), "generation": st.booleans(), "thinking": st.booleans()},
    optional={"first": st.integers(0, 5), "after": st.integers(0, 5)},
)


def steers_at(apply: dict, i: int, n_prompt: int, thinks: bool) -> bool:
    if i < n_prompt:
        return apply["prompt"]
    inside = apply["thinking"] if thinks else apply["generation"]
    return inside and apply.get("after", 0) <= i - n_prompt < apply.get("first", 1000)


@settings(max_examples=150, deadline=None)
@given(APPLIES, st.integers(0, 6), st.lists(st.booleans(), min_size=10, max_size=10), st.data())
def test_windows_do_not_depend_on_the_chunks(
    apply: dict, n_prompt: int, thinks: list[bool], data: st.DataObject
) -> None:
    """Prefill in chunks and then token by token must steer exactly the tokens of one pass."""
    expected = [steers_at(apply, i, n_prompt, thinks[i]) for i in range(10)]
    try:
        plan = compiled({"vectors": [{"id": "a", "apply": apply}]})
    except Exception:
        assert not any(expected)  # refused because it selects nothing
        return
    bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH)
    lease = bank.acquire(plan)
    assert lease is not None
    hidden = drawn(1, 10, WIDTH)
    marks = np.array(thinks)
    whole = SteeredRequest(lease, n_prompt)
    one = passed(SteerStep(bank, [Span(10, 0, whole, marks)]), hidden)
    assert (one != hidden).any(1).tolist() == expected
    counts = whole.count(10, marks)
    assert counts.n_inside == (counts.n_steered,) == (sum(expected),)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 9)))), 10]
    chunked = SteeredRequest(lease, n_prompt)
    pieces = [
        passed(
            SteerStep(bank, [Span(2), Span(end - at, at, chunked, marks[at:end])]),
            torch.cat([drawn(2, 2, WIDTH), hidden[at:end]]),
        )[2:]
        for at, end in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(pieces), one)
    assert chunked.count(10, marks) == counts


def test_parts_of_one_request_have_their_own_windows(bank: Bank) -> None:
    """One window for the whole request would steer the prompt with what is for the answer."""
    hidden = torch.zeros(6, WIDTH)
    spec = {
        "vectors": [
            {"id": "a", "apply": {"generation": False}},
            {"id": "b", "apply": {"prompt": False}},
            {"id": "c"},
        ]
    }
    request = requested(bank, spec, n_prompt=4)
    got = passed(SteerStep(bank, [Span(6, 0, request)]), hidden)
    a, b, c = (SHELF.vector(name).row(1) for name in "abc")
    assert torch.allclose(got[:4], (a + c).expand(4, -1), atol=1e-6)
    assert torch.allclose(got[4:], (b + c).expand(2, -1), atol=1e-6)


def test_only_the_layers_asked_for_are_touched(bank: Bank) -> None:
    """A hook on every layer costs the unsteered ones their speed."""
    spec = {"vectors": [{"id": "a", "layers": [0, 2], "apply": {"prompt": False}}]}
    request = requested(bank, spec, n_prompt=4)
    assert SteerStep(bank, [Span(2, 4, request)]).layers == {0, 2}
    assert SteerStep(bank, [Span(4, 0, request)]).layers == frozenset()
    assert SteerStep(bank, [Span(4)]).layers == frozenset()
    assert SteerStep(bank, []).layers == frozenset()


def test_a_step_refuses_another_batch(bank: Bank) -> None:
    """A step run over other tokens than it was made for steers strangers."""
    step = SteerStep(bank, [Span(4, 0, requested(bank, "a", n_prompt=4))])
    with pytest.raises(ValueError, match="4 tokens"):
        step.apply(1, drawn(1, 5, WIDTH))


# --- gates


def scores(hidden: torch.Tensor, name: str, layer: int) -> torch.Tensor:
    return torch.sigmoid(0.5 * along(hidden, name, layer) + 0.1)


@pytest.mark.parametrize(("side", "sign"), [("above", 1), ("below", -1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_gate_matches_the_formula(bank: Bank, side: str, sign: int, layer: int) -> None:
    """A gate read from the wrong layer, direction or token opens at the wrong places."""
    hidden = drawn(5, 40, WIDTH)
    when = {"probe": "b", side: 0.55, "layer": layer}
    request = requested(bank, {"vectors": [{"id": "a"}], "when": when}, n_prompt=30)
    other = requested(bank, "c", n_prompt=4)
    step = SteerStep(bank, [Span(4, 0, other), Span(36, 0, request)])
    got = passed(step, hidden)
    is_open = sign * (scores(hidden[4:], "b", layer) - 0.55) > 0
    assert 5 < int(is_open.sum()) < 31
    expected = hidden[4:] + is_open.unsqueeze(1) * SHELF.vector("a").row(1)
    assert torch.allclose(got[4:], expected, atol=1e-6)
    assert torch.equal(got[4:][~is_open], hidden[4:][~is_open])
    assert torch.allclose(got[:4], hidden[:4] + SHELF.vector("c").row(1), atol=1e-6)
    counts = request.count(36)
    assert (counts.n_inside, counts.n_steered) == ((36,), int(is_open.sum()))
    assert counts.n_open == (counts.n_steered,)
    assert other.count(4) == Counts(4, (4,), (4,), {})


def test_a_gate_reads_the_states_before_its_own_steering(bank: Bank) -> None:
    """A gate that reads what it has just changed opens or shuts itself."""
    hidden = drawn(5, 40, WIDTH)
    spec = {"vectors": [{"id": "b", "scale": -50, "when": {"probe": "b", "above": 0.55}}]}
    spec["vectors"][0]["when"]["layer"] = 1
    got = passed(SteerStep(bank, [Span(40, 0, requested(bank, spec, n_prompt=40))]), hidden)
    assert torch.equal((got != hidden).any(1), scores(hidden, "b", 1) > 0.55)


def test_each_part_has_its_own_gate(bank: Bank) -> None:
    """With one gate a request, `above` and `below` of two terms decide for each other."""
    hidden = drawn(5, 40, WIDTH)
    spec = {
        "vectors": [
            {"id": "a", "when": {"probe": "b", "above": 0.55}},
            {"id": "c", "when": {"probe": "b", "below": 0.55}},
            {"id": "d"},
        ]
    }
    got = passed(SteerStep(bank, [Span(40, 0, requested(bank, spec, n_prompt=40))]), hidden)
    is_open = (scores(hidden, "b", 0) > 0.55).unsqueeze(1)
    a, c, d = (SHELF.vector(name).row(1) for name in "acd")
    assert torch.allclose(got, hidden + d + torch.where(is_open, a, c), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_prompt_gate_decides_once(bank: Bank, sign: int) -> None:
    """A gate that is asked again while decoding flips in the middle of the answer."""
    when = {"probe": "b", "above": 0.5, "per": "prompt"}
    request = requested(bank, {"vectors": [{"id": "a"}], "when": when}, n_prompt=6)
    push = (sign * 2 * unit("b", 0)).float()
    prompt = drawn(1, 6, WIDTH) + push
    prompt[0] -= 1000 * push  # the first token is an attention sink; it must not decide
    step = SteerStep(bank, [Span(3), Span(6, 0, request)])
    got = passed(step, torch.cat([drawn(2, 3, WIDTH), prompt]))[3:]
    change = SHELF.vector("a").row(1) if sign > 0 else torch.zeros(WIDTH)
    assert torch.allclose(got - prompt, change.expand(6, -1), atol=1e-4)
    answer = drawn(3, 1, WIDTH) - 10 * push  # says the opposite
    after = passed(SteerStep(bank, [Span(1, 6, request)]), answer)
    assert torch.allclose(after - answer, change.expand(1, -1), atol=1e-5)
    again = passed(SteerStep(bank, [Span(6, 0, request)]), -prompt)  # recomputed, as after a pause
    assert torch.allclose(again + prompt, change.expand(6, -1), atol=1e-4)


def test_a_prompt_gate_refuses_half_a_prompt(bank: Bank) -> None:
    """Deciding on the first chunk would give an answer that depends on the batch size."""
    when = {"probe": "b", "above": 0.5, "per": "prompt"}
    request = requested(bank, {"vectors": [{"id": "a"}], "when": when}, n_prompt=6)
    for span in (Span(5, 0, request), Span(3, 3, request)):
        with pytest.raises(ValueError, match="whole prompt"):
            SteerStep(bank, [span])


def test_token_gates_do_not_depend_on_the_chunks(bank: Bank) -> None:
    """A gate's answer that is kept from the chunk before opens for other tokens."""
    hidden = drawn(5, 20, WIDTH)
    spec = {"vectors": [{"id": "a"}], "when": {"probe": "b", "above": 0.55}}
    one = passed(SteerStep(bank, [Span(20, 0, requested(bank, spec, n_prompt=12))]), hidden)
    request = requested(bank, spec, n_prompt=12)
    cuts = [0, 5, 12, *range(13, 21)]
    pieces = [
        passed(SteerStep(bank, [Span(end - at, at, request)]), hidden[at:end])
        for at, end in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(pieces), one)

"""Steering inside a model: gone when the pass is over, and the same however the pass is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import llama
from transformers import PreTrainedModel

from trimtab.steering.bank import Bank
from trimtab.steering.model.decoder import find_decoder_layers
from trimtab.steering.model.hooks import captured, steered
from trimtab.steering.plan import Plan, additive_plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.window import Window

WIDTH, N_LAYERS = 32, 4
IDS = (torch.arange(48).view(4, 12) * 7 + 3) % 128


class Toy:
    """A seeded four-layer Llama with its bank."""

    def __init__(self) -> None:
        self.model: PreTrainedModel = llama(num_hidden_layers=N_LAYERS)
        self.layers = find_decoder_layers(self.model)
        self.bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH)

    def request(self, plan: Plan, *, n_prompt: int = 12) -> SteeredRequest:
        lease = self.bank.acquire(plan)
        assert lease is not None
        return SteeredRequest(lease, n_prompt)

    def run(self, ids: torch.Tensor, spans: list[Span] | None = None, **inputs: Any) -> Any:
        step = None if spans is None else SteerStep(self.bank, spans)
        with torch.no_grad(), steered(self.layers, step):
            return self.model(input_ids=ids, **inputs)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def rows(seed: int, *layers: int, size: float = 1.0) -> dict[int, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(WIDTH, generator=g) * size for layer in layers}


def plan(seed: int = 0, *, window: Window | None = None, normalize: bool = False) -> Plan:
    whole = additive_plan(rows(seed, 1, 2), normalize=normalize)
    if window is None:
        return whole
    (part,) = whole.parts
    part = type(part)(window, None, part.layers, f"{part.digest}{window}")
    return Plan((part,), part.digest, part.digest)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("error", [None, ValueError, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "body"])
def test_no_hook_survives(toy: Toy, error: type[BaseException] | None, where: str) -> None:
    """A hook left behind steers every later request of everybody."""
    step = SteerStep(toy.bank, [Span(12, 0, toy.request(plan()))])

    def fail(*_: Any) -> None:
        if error is not None and where == "forward":
            raise error("no")

    def run() -> None:
        with torch.no_grad(), captured(toy.layers, [1, 3]), steered(toy.layers, step):
            assert hooks_of(toy.model) == before + 4
            toy.model(input_ids=IDS[:1])
            if error is not None:
                raise error("no")

    handle = toy.layers[2].register_forward_pre_hook(fail)
    before = hooks_of(toy.model)
    try:
        if error is None:
            run()
        else:
            with pytest.raises(error):
                run()
        assert hooks_of(toy.model) == before
    finally:
        handle.remove()


def test_bad_steps_leave_no_hook(toy: Toy) -> None:
    """A layer the model lacks, or another batch's step, must not leave the first hooks in place."""
    step = SteerStep(toy.bank, [Span(12, 0, toy.request(plan()))])
    with pytest.raises(IndexError), steered(toy.layers[:2], step):
        pass
    assert hooks_of(toy.model) == 0
    with pytest.raises(ValueError, match="12 tokens"), torch.no_grad(), steered(toy.layers, step):
        toy.model(input_ids=IDS[:1, :5])
    assert hooks_of(toy.model) == 0
    with pytest.raises(IndexError), captured(toy.layers, [0, 9]):
        pass
    assert hooks_of(toy.model) == 0


def test_unsteered_passes_carry_no_hook(toy: Toy) -> None:
    """A hook that does nothing still costs an unsteered server its speed."""
    with steered(toy.layers, None):
        assert hooks_of(toy.model) == 0
    with steered(toy.layers, SteerStep(toy.bank, [Span(12)])):
        assert hooks_of(toy.model) == 0


def test_scale_0_is_bit_identical(toy: Toy) -> None:
    """A request that asks for nothing must get exactly what everybody else gets."""
    plain = toy.run(IDS).logits
    nothing = toy.request(additive_plan({}))
    assert torch.equal(toy.run(IDS, [Span(48, 0, nothing)]).logits, plain)
    zero = toy.request(additive_plan({1: torch.zeros(WIDTH)}))
    assert torch.equal(toy.run(IDS, [Span(48, 0, zero)]).logits, plain)


def test_batch_mates_are_bit_identical(toy: Toy) -> None:
    """Steering one request of a batch must not move its neighbours by one bit."""
    plain = toy.run(IDS).logits
    loud = toy.request(plan(normalize=True))
    spans = [Span(12), Span(12, 0, loud), Span(12), Span(12, 0, toy.request(plan(1)))]
    got = toy.run(IDS, spans).logits
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[2], plain[2])
    assert not torch.allclose(got[1], plain[1], atol=1e-2)
    alone = toy.run(IDS, [Span(36), Span(12, 0, toy.request(plan(1)))]).logits
    assert torch.equal(got[3], alone[3])


def test_a_vector_there_and_back_cancels(toy: Toy) -> None:
    """Two steps nested on one layer must both act; a second hook that replaces the first would."""
    plain = toy.run(IDS).logits
    there = SteerStep(toy.bank, [Span(48, 0, toy.request(additive_plan(rows(0, 1))))])
    back = {layer: -row for layer, row in rows(0, 1).items()}
    again = SteerStep(toy.bank, [Span(48, 0, toy.request(additive_plan(back)))])
    with torch.no_grad(), steered(toy.layers, there):
        away = toy.model(input_ids=IDS).logits
        with steered(toy.layers, again):
            home = toy.model(input_ids=IDS).logits
    assert not torch.allclose(away, plain, atol=1e-2)
    assert torch.allclose(home, plain, atol=1e-4)


@pytest.mark.parametrize("order", ["captured first", "steered first"])
def test_captured_states_are_the_steered_ones(toy: Toy, order: str) -> None:
    """What a builder or a page reads must be what the next layer reads, in either nesting."""
    step = SteerStep(toy.bank, [Span(12, 0, toy.request(additive_plan(rows(0, 1))))])
    with torch.no_grad(), captured(toy.layers, [1]) as plain:
        toy.model(input_ids=IDS[:1])
    if order == "captured first":
        with torch.no_grad(), captured(toy.layers, [1]) as seen, steered(toy.layers, step):
            toy.model(input_ids=IDS[:1])
    else:
        with torch.no_grad(), steered(toy.layers, step), captured(toy.layers, [1]) as seen:
            toy.model(input_ids=IDS[:1])
    assert torch.allclose(seen[1] - plain[1], rows(0, 1)[1].expand(1, 12, -1), atol=1e-5)


WINDOWS = [
    Window(),
    Window(generation=False, thinking=False),
    Window(prompt=False),
    Window(thinking=False),
    Window(prompt=False, generation=False),
    Window(first=2),
    Window(after=2),
    Window(prompt=False, first=3, after=1),
    Window(thinking=False, after=1),
]
THINKING = np.array([False] * 7 + [True] * 3 + [False] * 2)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_prefill_in_chunks_then_decoding_equals_one_pass(
    toy: Toy, window: Window, normalize: bool
) -> None:
    """A window counted from the chunk, or one cached key left unsteered, changes the answer."""
    asked = plan(window=window, normalize=normalize)
    n_prompt = 6
    one = toy.run(IDS[:1], [Span(12, 0, toy.request(asked, n_prompt=n_prompt), THINKING)]).logits
    request = toy.request(asked, n_prompt=n_prompt)
    pieces, cache = [], None
    cuts = [0, 4, 6, *range(7, 13)]
    for at, end in itertools.pairwise(cuts):
        span = Span(end - at, at, request, THINKING[at:end])
        output = toy.run(IDS[:1, at:end], [span], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), one, atol=1e-4)
    plain = toy.run(IDS[:1]).logits
    assert not torch.allclose(one, plain, atol=1e-2)


class Layer(nn.Module):
    """A layer that answers in the way it is told."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.answer(hidden)


@pytest.mark.parametrize(
    "answer",
    [
        lambda h: h,
        lambda h: (h,),
        lambda h: (h, "cache", None),
        lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
        lambda h: torch.cat([h, h], dim=-1)[..., : h.shape[-1]],
    ],
)
def test_any_form_of_output_is_steered_and_kept(answer: Any) -> None:
    """A tuple cut down to its first entry loses the attention weights or the cache."""
    layer = Layer(answer)
    bank = Bank(n_layers=1, hidden_size=WIDTH)
    lease = bank.acquire(additive_plan(rows(0, 0)))
    assert lease is not None
    hidden = torch.randn(2, 3, WIDTH)
    before = hidden.clone()
    with steered([layer], SteerStep(bank, [Span(6, 0, SteeredRequest(lease, 6))])):
        got = layer(hidden)
    plain = layer(hidden)
    assert type(got) is type(plain)
    if isinstance(got, tuple):
        assert got[1:] == plain[1:]
        got = got[0]
    assert torch.allclose(got, before + rows(0, 0)[0], atol=1e-6)
    assert torch.equal(hidden, before)

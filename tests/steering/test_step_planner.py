"""A step that is used again must be the one that would have been made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from step_shelf import N_LAYERS, WIDTH, drawn, passed, requested

from trimtab.steering.bank import Bank
from trimtab.steering.step import Span, SteerStep, Watch
from trimtab.steering.step_planner import StepPlanner


@pytest.fixture
def bank() -> Bank:
    return Bank(n_layers=N_LAYERS, hidden_size=WIDTH)


def test_decoding_uses_one_step(bank: Bank) -> None:
    """Gathering every row anew for each token costs more than the steering."""
    planner = StepPlanner(bank)
    a, b = requested(bank, "a", n_prompt=4), requested(bank, "2.0 b", n_prompt=3)
    steps = [planner.step([Span(1, 9 + i, a), Span(1), Span(1, 5 + i, b)]) for i in range(5)]
    assert all(step is steps[0] for step in steps)
    hidden = drawn(1, 3, WIDTH)
    again = passed(steps[4], hidden)
    assert torch.equal(
        again, passed(SteerStep(bank, [Span(1, 9, a), Span(1), Span(1, 5, b)]), hidden)
    )
    assert torch.equal(again, passed(steps[0], hidden))


@pytest.mark.parametrize(
    "change",
    ["order", "count", "gone", "a slot taken again", "out of the prompt"],
)
def test_any_change_makes_a_new_step(bank: Bank, change: str) -> None:
    """A step kept for another batch steers strangers."""
    planner = StepPlanner(bank)
    answer_only = {"vectors": [{"id": "a", "apply": {"prompt": False}}]}
    a, b = requested(bank, answer_only, n_prompt=4), requested(bank, "2.0 b", n_prompt=3)
    before = [Span(1, 9, a), Span(1, 5, b)]
    planner.step(before)
    after = list(before)
    if change == "order":
        after.reverse()
    elif change == "count":
        after[1] = Span(2, 5, b)
    elif change == "gone":
        after[1] = Span(1)
    elif change == "a slot taken again":
        bank.release(b.lease)
        after[1] = Span(1, 5, requested(bank, "-1.0 near", n_prompt=3))
    else:
        planner = StepPlanner(bank)
        before[0] = Span(1, 3, a)
        planner.step(before)
    hidden = drawn(2, sum(span.n_tokens for span in after), WIDTH)
    assert torch.equal(passed(planner.step(after), hidden), passed(SteerStep(bank, after), hidden))


STEADY: list[tuple[Any, int, bool]] = [
    ("a", 0, True),
    ("a", 9, True),
    ({"vectors": [{"id": "a", "apply": {"prompt": False}}]}, 0, False),
    ({"vectors": [{"id": "a", "apply": {"prompt": False}}]}, 9, True),
    ({"vectors": [{"id": "a", "apply": {"first": 8}}]}, 9, False),
    ({"vectors": [{"id": "a", "apply": {"after": 8}}]}, 9, False),
    ({"vectors": [{"id": "a"}], "when": {"probe": "b", "above": 0.5}}, 9, False),
]


@pytest.mark.parametrize(("spec", "start", "expected"), STEADY)
def test_what_depends_on_the_position_is_never_kept(
    bank: Bank, spec: Any, start: int, expected: bool
) -> None:
    """A window that has closed, or a gate that decides anew, under an old step."""
    span = Span(1, start, requested(bank, spec, n_prompt=4))
    assert span.is_steady is expected
    planner = StepPlanner(bank)
    first, second = planner.step([span]), planner.step([span])
    assert (first is second) is expected


def test_thinking_and_probes_are_never_kept(bank: Bank) -> None:
    """A thinking span that ends while its step goes on; a probe's reading from the step before."""
    apart = {"vectors": [{"id": "a", "apply": {"thinking": False}}]}
    request = requested(bank, apart, n_prompt=4)
    assert not Span(1, 9, request, np.array([True])).is_steady
    assert not Span(1, 9, None, watch=Watch(())).is_steady

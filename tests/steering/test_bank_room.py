"""The account of a bank in another process says what that bank would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plans import N_LAYERS, PLANS, WIDTH, compiled

from trimtab.steering.bank import Bank, Lease
from trimtab.steering.bank_room import BankRoom, Needs, check_fits
from trimtab.steering.errors import SpecError
from trimtab.steering.plan import LayerTerm, Part, Plan, fingerprint_of
from trimtab.steering.window import Window


def twice(part: Part) -> Plan:
    """Return a plan with two equal parts, which take one slot."""
    return Plan((part, part), fingerprint_of((part, part)), None)


SMALL = Part.of(Window(), None, {0: LayerTerm(add=torch.ones(WIDTH))})
CHOICES = [*PLANS.values(), compiled("a"), compiled("0 a"), twice(SMALL), Plan((SMALL,), "", None)]
ACTIONS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 99)), min_size=1, max_size=60
)  # (take or give back, which)
SIZES = st.tuples(st.integers(1, 6), st.integers(0, 8), st.integers(0, 8), st.integers(0, 4))


def in_use(bank: Bank) -> Needs:
    return Needs(
        bank.n_live,
        bank.max_rows - len(bank._free_rows),
        bank.max_low_rank - len(bank._free_low),
        bank.max_guides - bank.goals.n_free,
    )


@settings(max_examples=150, deadline=None)
@given(ACTIONS, SIZES)
def test_it_takes_and_frees_what_the_bank_does(
    actions: list[tuple[bool, int]], sizes: tuple[int, int, int, int]
) -> None:
    """An account that drifts keeps requests waiting forever, or sends them into a full bank."""
    slots, rows, low, guides = sizes
    bank = Bank(
        n_layers=N_LAYERS,
        hidden_size=WIDTH,
        max_slots=slots,
        max_rows=rows,
        max_low_rank=low,
        max_guides=guides,
    )
    room = BankRoom(Needs(*sizes))
    assert room.size == bank.size
    held: list[tuple[Plan, Lease]] = []
    for is_taking, which in actions:
        if is_taking:
            plan = CHOICES[which % len(CHOICES)]
            lease = bank.acquire(plan)
            assert room.take(plan) == (lease is not None)
            if lease is not None:
                held.append((plan, lease))
        elif held:
            plan, lease = held.pop(which % len(held))
            bank.release(lease)
            room.give_back(plan)
        assert room.used == in_use(bank)
    for plan, lease in held:
        bank.release(lease)
        room.give_back(plan)
    assert room.used == Needs(0, 0, 0, 0) == in_use(bank)


def test_a_plan_larger_than_the_bank_is_refused() -> None:
    """It would wait for room that never comes."""
    plan = PLANS["added"]
    need = Needs.of(plan.parts)
    check_fits(plan, need)
    with pytest.raises(SpecError, match="fewer layers"):
        check_fits(plan, Needs(need.slots, need.rows - 1, need.low, need.guides))

"""The bank: shared, counted, never overfull, and clean after its last holder is gone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from trimtab.kernels import steer
from trimtab.steering.artifact import ModelRef
from trimtab.steering.bank import Bank, Lease
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.errors import SpecError
from trimtab.steering.plan import Plan, additive_plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.vector import VectorArtifact

WIDTH, N_LAYERS = 8, 3
HIDDEN = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))


class Random:
    """A source of vectors: any name, its direction drawn from the name."""

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        return VectorArtifact(
            id=name,
            model=ModelRef("toy", None, "llama", WIDTH, N_LAYERS),
            layers=tuple(range(N_LAYERS)),
            directions=torch.randn(N_LAYERS, WIDTH, generator=g),
            default_layers=(0, 2),
            method="caa",
        )


def plan(spec: Any) -> Plan:
    return compile_plan(
        parse_spec(spec),
        Random(),
        model=ModelRef("toy", None, "llama", WIDTH, N_LAYERS),
        hidden_norms=torch.ones(N_LAYERS),
        limits=Limits(max_dose=None),
    )


PLANS = [
    plan("a"),
    plan("b"),
    plan({"vectors": [{"id": "a", "normalize": True}]}),
    plan({"vectors": [{"id": "a"}, {"id": "c", "apply": {"prompt": False}}]}),
    plan({"vectors": [{"id": "c", "apply": {"prompt": False}}]}),
    plan({"ablate": [{"id": "a"}, {"id": "b", "to": 0.5}]}),
    plan({"vectors": [{"id": "b"}], "ablate": [{"id": "c", "layers": [1]}]}),
    plan("0 a"),
]


def bank(**changes: int) -> Bank:
    sizes = {"max_slots": 4, "max_rows": 7, "max_low_rank": 8}
    return Bank(n_layers=N_LAYERS, hidden_size=WIDTH, **sizes | changes)


def held(bank: Bank, plan: Plan) -> Lease:
    lease = bank.acquire(plan)
    assert lease is not None
    return lease


def snapshot(bank: Bank) -> list:
    """Return everything a bank holds, to compare."""
    tensors = [bank.rows, bank.low_a, bank.low_b, bank.row_of, bank.low_of, bank.norm]
    tables = [bank.touches, bank.has_low_rank, bank.has_norm]
    free = [bank._free_slots, bank._free_rows, bank._free_low]
    counts = sorted((slot, x.digest, x.count) for slot, x in bank._held.items())
    return [
        [x.tolist() for x in (*tensors, *tables)],
        [sorted(x) for x in free],
        counts,
        dict(bank._slot_of),
        sorted(bank.gates),
    ]


def expected_at(plan: Plan, layer: int) -> torch.Tensor:
    """Steer `HIDDEN` at one layer from the plan itself, without a bank."""
    out = HIDDEN.double()
    keeps = False
    for part in plan.parts:
        term = part.layers.get(layer)
        if term is None:
            continue
        if term.low_a is not None and term.low_b is not None:
            out = out - HIDDEN.double() @ term.low_b.double().T @ term.low_a.double()
        if term.add is not None:
            out = out + term.add.double()
        keeps |= term.normalize
    if keeps:
        out = out * (HIDDEN.double().norm(dim=1) / out.norm(dim=1)).unsqueeze(1)
    return out


def check_steers(bank: Bank, lease: Lease) -> None:
    slots = torch.tensor([lease.slots] * len(HIDDEN), dtype=torch.int64).view(len(HIDDEN), -1)
    for layer in range(N_LAYERS):
        got = steer(HIDDEN, slots, bank=bank.layer(layer))
        assert torch.allclose(got.double(), expected_at(lease.plan, layer), atol=1e-5)


@pytest.mark.parametrize("index", range(len(PLANS)))
def test_a_lease_steers_as_its_plan_says(index: int) -> None:
    """A row written to a neighbour's place serves one request another's steering."""
    b = bank(max_slots=8, max_rows=30, max_low_rank=30)
    other = held(b, PLANS[1])
    lease = held(b, PLANS[index])
    check_steers(b, lease)
    check_steers(b, other)


def test_equal_digests_share_a_slot() -> None:
    """Without sharing, 200 users of one preset fill the bank and the 201st waits for nothing."""
    b = bank()
    leases = [held(b, plan("a")) for _ in range(50)]
    assert {lease.slots for lease in leases} == {leases[0].slots}
    assert b.n_live == 1
    mixed = held(b, PLANS[3])  # `a` for all tokens, and `c` after the prompt
    assert leases[0].slots[0] in mixed.slots
    assert b.n_live == 2


def test_content_stays_until_its_last_holder_is_gone() -> None:
    """Clearing at the first release stops steering everyone who shares the slot."""
    b = bank()
    empty = snapshot(b)
    first, second = held(b, PLANS[0]), held(b, PLANS[0])
    b.release(first)
    check_steers(b, second)
    b.release(second)
    assert b.n_live == 0
    assert snapshot(b)[1:] == empty[1:]


@pytest.mark.parametrize("index", range(len(PLANS)))
def test_released_content_is_cleared(index: int) -> None:
    """A slot that keeps what it held steers the next request that is given it."""
    b = bank(max_slots=1)
    for p in (PLANS[5], PLANS[2], PLANS[6]):  # low rank, norm, both kinds
        b.release(held(b, p))
        slots = torch.ones(len(HIDDEN), 1, dtype=torch.int64)
        for layer in range(N_LAYERS):
            assert torch.equal(steer(HIDDEN, slots, bank=b.layer(layer)), HIDDEN)
        assert not any(table.any() for table in (b.touches, b.has_low_rank, b.has_norm))
        assert b.gates == {}
    if len(PLANS[index].parts) <= 1:
        check_steers(b, held(b, PLANS[index]))


@pytest.mark.parametrize(
    ("sizes", "first", "second"),
    [
        ({"max_slots": 1}, 0, 1),
        ({"max_slots": 2}, 1, 3),  # one of two slots is free, both are needed
        ({"max_rows": 3}, 0, 1),
        ({"max_low_rank": 6}, 5, 6),
    ],
)
def test_a_full_bank_returns_none_and_changes_nothing(sizes: dict, first: int, second: int) -> None:
    """Half a plan left behind is a leak; half a plan handed out is a request half steered."""
    b = bank(**sizes)
    lease = held(b, PLANS[first])
    before = snapshot(b)
    assert b.acquire(PLANS[second]) is None
    assert snapshot(b) == before
    again = held(b, PLANS[first])  # shared, so it takes no room
    b.release(lease)
    b.release(again)
    check_steers(b, held(b, PLANS[second]))


def test_a_plan_that_can_never_fit_is_refused() -> None:
    """Waiting for room that will never be hangs the request, and the queue behind it."""
    everywhere = additive_plan({n: torch.ones(WIDTH) for n in range(N_LAYERS)})
    bank(max_rows=3).check_fits(everywhere)
    with pytest.raises(SpecError, match="3 rows") as caught:
        bank(max_rows=2).check_fits(everywhere, param="steering.vectors")
    assert caught.value.param == "steering.vectors"
    with pytest.raises(SpecError, match="slots"):
        bank(max_slots=1).check_fits(PLANS[3])
    with pytest.raises(SpecError, match="low-rank"):
        bank(max_low_rank=5).check_fits(PLANS[5])
    bank(max_low_rank=6).check_fits(PLANS[5])


def test_a_lease_is_found_among_its_like() -> None:
    """Comparing tensors field by field raises, in the middle of ending somebody's request."""
    b = bank()
    leases = [held(b, plan("a")), held(b, plan("b")), held(b, plan("b"))]
    last = leases[2]
    leases.remove(last)
    assert last not in leases
    assert len({*leases, last}) == 3


def test_addresses_never_change() -> None:
    """A captured graph reads the buffers it was captured with, for ever."""
    b = bank()
    before = [x.data_ptr() for x in (b.rows, b.low_a, b.low_b, b.row_of, b.low_of, b.norm)]
    for p in PLANS:
        b.release(held(b, p))
    after = [x.data_ptr() for x in (b.rows, b.low_a, b.low_b, b.row_of, b.low_of, b.norm)]
    assert before == after
    assert b.layer(1).row_of.data_ptr() == b.row_of[1].data_ptr()


def test_a_thousand_requests_leave_no_trace() -> None:
    """A slot lost in one of a thousand requests stops the server within a day."""
    rng = random.Random(0)
    b = bank()
    empty = snapshot(b)
    leases: list[Lease] = []
    n_full = 0
    for _ in range(1000):
        if leases and rng.random() < 0.5:
            b.release(leases.pop(rng.randrange(len(leases))))
        elif (lease := b.acquire(rng.choice(PLANS))) is not None:
            leases.append(lease)
        else:
            n_full += 1
    assert n_full > 20  # the walk was long enough at the bound to mean something
    for lease in leases:
        check_steers(b, lease)
        b.release(lease)
    assert snapshot(b)[1:] == empty[1:]
    for now, was in zip(snapshot(b)[0][3:], empty[0][3:], strict=True):
        assert now == was


class BankWalk(RuleBasedStateMachine):
    """Any order of acquiring and releasing, against counts kept by hand."""

    leases: Bundle = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.bank = bank()
        self.live: list[Lease] = []

    @rule(target=leases, index=st.integers(0, len(PLANS) - 1))
    @precondition(lambda self: len(self.live) < 30)
    def acquire(self, index: int) -> Any:
        wanted = PLANS[index]
        known = {part.digest for lease in self.live for part in lease.plan.parts}
        lease = self.bank.acquire(wanted)
        if lease is None:
            assert {part.digest for part in wanted.parts} - known
        else:
            self.live.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            self.live.remove(lease)
            self.bank.release(lease)

    @invariant()
    def every_holder_is_steered(self) -> None:
        for lease in {lease.plan.fingerprint: lease for lease in self.live}.values():
            check_steers(self.bank, lease)

    @invariant()
    def only_what_is_held_is_taken(self) -> None:
        parts = {p.digest: p for lease in self.live for p in lease.plan.parts}
        n_rows = sum(t.add is not None for p in parts.values() for t in p.layers.values())
        n_low = sum(
            len(t.low_a) for p in parts.values() for t in p.layers.values() if t.low_a is not None
        )
        assert self.bank.n_live == len(parts)
        assert len(self.bank._free_slots) == self.bank.max_slots - len(parts)
        assert len(self.bank._free_rows) == self.bank.max_rows - n_rows
        assert len(self.bank._free_low) == self.bank.max_low_rank - n_low


TestBankWalk = BankWalk.TestCase
TestBankWalk.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_second_release_is_refused():
    """Catches a double release that frees the slot of another request with the same plan."""
    bank = Bank(n_layers=2, hidden_size=4)
    plan = additive_plan({0: torch.ones(4)})
    first, second = bank.acquire(plan), bank.acquire(plan)
    assert first is not None
    assert second is not None
    bank.release(first)
    with pytest.raises(ValueError, match="not held"):
        bank.release(first)
    assert bank.n_live == 1

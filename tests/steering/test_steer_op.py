"""The steering op against its formula, written out token by token in float64.

Every test runs the plain torch reference and the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from on_device import IMPLEMENTATIONS, implemented, on_device
from triton_interpreter import is_interpreted

from trimtab import kernels
from trimtab.kernels import LayerBank

steer, steer_stream, shift = map(on_device, (kernels.steer, kernels.steer_stream, kernels.shift))

WIDTHS = (1, 7, 16, 64)
TOKENS = (0, 1, 5, 16)
# Of the result's RMS: float32 arithmetic, and one rounding of the result to its own type.
BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    with implemented(request.param, device):
        yield request.param


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    slots: torch.Tensor
    gates: torch.Tensor
    bank: LayerBank


def case(n_tokens: int, width: int, *, n_parts: int = 3, rank: int = 2, seed: int = 0) -> Case:
    """Random bank of 6 slots; slot 0 is null, slot 1 has no row, slot 2 no low-rank pair."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    n_slots, n_rows, n_low = 6, 8, 9
    zero_first = torch.ones(max(n_rows, n_low), 1)
    zero_first[0] = 0
    row_of = torch.randint(1, n_rows, (n_slots,), generator=g)
    low_of = torch.randint(0, n_low, (n_slots, rank), generator=g)
    row_of[[0, 1]] = 0
    low_of[[0, 2]] = 0
    norm = torch.tensor([False, True, False, True, False, True])
    size = width**-0.5
    bank = LayerBank(
        rows=drawn(n_rows, width) * zero_first[:n_rows],
        row_of=row_of,
        norm=norm,
        low_a=drawn(n_low, width) * zero_first[:n_low] * size,
        low_b=drawn(n_low, width) * zero_first[:n_low] * size,
        low_of=low_of,
    )
    slots = torch.randint(0, n_slots, (n_tokens, n_parts), generator=g)
    gates = torch.rand(n_tokens, n_parts, generator=g)
    gates[torch.rand(n_tokens, n_parts, generator=g) < 0.3] = 0.0
    return Case(drawn(n_tokens, width) * 3, slots, gates, bank)


def by_hand(c: Case, hidden: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    out = hidden.double().clone()
    for t, h in enumerate(hidden.double()):
        changed, keeps_norm = h.clone(), False
        for m, slot in enumerate(c.slots[t].tolist()):
            g = 1.0 if gates is None else float(gates[t, m])
            change = c.bank.rows[c.bank.row_of[slot]].double()
            for pair in c.bank.low_of[slot].tolist():
                a, b = c.bank.low_a[pair].double(), c.bank.low_b[pair].double()
                change = change - a * float(b @ h)
            changed = changed + g * change
            keeps_norm |= bool(c.bank.norm[slot]) and g > 0
        if keeps_norm and changed.norm() > 0:
            changed = changed * (h.norm() / changed.norm())
        out[t] = changed
    return out


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of an entry, as a share of the expected RMS."""
    if expected.numel() == 0:
        return 0.0
    rms = expected.pow(2).mean().sqrt().clamp_min(1e-30)
    return float((got.double() - expected).abs().max() / rms)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_tokens", TOKENS)
@pytest.mark.parametrize("gated", [False, True])
def test_op_is_its_formula(
    n_tokens: int, width: int, dtype: torch.dtype, gated: bool, implementation: str
) -> None:
    """A wrong axis, a part read from another token, or arithmetic in the half type."""
    if implementation == "triton" and is_interpreted():
        n_tokens = min(n_tokens, 2 if width < 64 else 5)  # 10 ms a token
    c = case(n_tokens, width, seed=width + n_tokens)
    hidden = c.hidden.to(dtype)
    gates = c.gates if gated else None
    got = steer(hidden, c.slots, bank=c.bank, gates=gates)
    assert (got.dtype, got.shape) == (dtype, hidden.shape)
    expected = by_hand(c, hidden, gates)
    # An entry of size x may be off by half a unit in its last place: bounded by the largest.
    largest = float(expected.abs().max() / expected.pow(2).mean().sqrt()) if n_tokens else 1.0
    assert error(got, expected) <= BOUNDS[dtype] * max(1.0, largest)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_real_width(dtype: torch.dtype) -> None:
    """A row that is longer than a warp's share, and sums over the whole of it."""
    c = case(3, 4096, n_parts=4, rank=8)
    hidden = c.hidden.to(dtype)
    expected = by_hand(c, hidden, c.gates)
    largest = float(expected.abs().max() / expected.pow(2).mean().sqrt())
    got = steer(hidden, c.slots, bank=c.bank, gates=c.gates)
    assert error(got, expected) <= BOUNDS[dtype] * largest


def every_second(x: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(2 * x.shape[0], 3 * x.shape[1])
    wide[::2, 1::3] = x
    return wide[::2, 1::3]


@pytest.mark.parametrize(
    "strided",
    [
        every_second,
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    ],
)
def test_strided_input_is_read_by_its_strides(strided: Callable) -> None:
    """Reading a view as if it were contiguous mixes neighbouring tokens."""
    c = case(9, 16)
    view = strided(c.hidden)
    assert not view.is_contiguous()
    before = view.clone()
    got = steer(view, c.slots, bank=c.bank, gates=c.gates)
    assert error(got, by_hand(c, c.hidden, c.gates)) <= 1e-5
    assert torch.equal(view, before)  # and nothing was written into it


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_null_slots_leave_tokens_bit_identical(dtype: torch.dtype) -> None:
    """An unsteered neighbour that passes through the op must come out as it went in."""
    c = case(16, 64)
    hidden = c.hidden.to(dtype)
    slots = c.slots.clone()
    slots[::2] = 0
    got = steer(hidden, slots, bank=c.bank)
    assert torch.equal(got[::2], hidden[::2])
    assert not torch.equal(got[1::2], hidden[1::2])
    shut = steer(hidden, c.slots, bank=c.bank, gates=torch.zeros_like(c.gates))
    assert torch.equal(shut, hidden)


def test_tokens_do_not_see_each_other() -> None:
    """A norm over the sequence, as in GrAInS' published hook, changes with the batch."""
    c = case(8, 64)
    whole = steer(c.hidden, c.slots, bank=c.bank, gates=c.gates)
    louder = c.hidden.clone()
    louder[4:] *= 100
    again = steer(louder, c.slots, bank=c.bank, gates=c.gates)
    assert torch.equal(again[:4], whole[:4])


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_preserved_over_the_hidden_dimension(width: int) -> None:
    """A steered state that grows with every layer ends in repetition."""
    c = case(5, width)
    slots = torch.tensor([[3, 5, 2]]).expand(5, 3)
    got = steer(c.hidden, slots, bank=c.bank)
    before, after = c.hidden.double().norm(dim=1), got.double().norm(dim=1)
    assert float(((after - before).abs() / before).max()) <= 1e-6
    assert not torch.allclose(got, c.hidden)


def test_a_shut_gate_does_not_ask_for_the_norm() -> None:
    """A part that is shut must not rescale what an open one without the wish has added."""
    c = case(4, 16)
    slots = torch.tensor([[2, 3]]).expand(4, 2)
    gates = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    got = steer(c.hidden, slots, bank=c.bank, gates=gates)
    assert torch.equal(got, steer(c.hidden, slots[:, :1], bank=c.bank))


def test_a_state_steered_to_zero_stays_zero() -> None:
    """Zero times an infinite ratio is NaN, and one NaN token spoils the whole answer."""
    c = case(1, 16)
    hidden = torch.full((1, 16), 100.0)
    c.bank.rows[c.bank.row_of[3]] = -100.0
    c.bank.low_of[3] = 0
    got = steer(hidden, torch.tensor([[3]]), bank=c.bank)
    assert torch.equal(got, torch.zeros(1, 16))


def test_the_switches_only_skip_what_is_not_there() -> None:
    """`has_low_rank=False` for a batch that has a low-rank part would drop an ablation."""
    c = case(8, 16)
    additive = torch.full((8, 3), 2)  # slot 2 has neither a pair nor the wish for the norm
    full = steer(c.hidden, additive, bank=c.bank)
    short = steer(c.hidden, additive, bank=c.bank, has_low_rank=False, has_norm=False)
    assert torch.equal(full, short)


@pytest.mark.parametrize(
    ("hidden", "slots", "gates"),
    [
        ((4, 16), (3, 2), None),
        ((4, 16), (4,), None),
        ((2, 2, 16), (2, 2), None),
        ((4, 15), (4, 2), None),
        ((4, 16), (4, 2), (4, 1)),
        ((4, 16), (4, 2), (4,)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    hidden: tuple, slots: tuple, gates: tuple | None
) -> None:
    """Broadcasting a gate or a slot over tokens it was not meant for steers the neighbours."""
    c = case(4, 16)
    with pytest.raises(ValueError, match="steer"):
        steer(
            torch.zeros(hidden),
            torch.zeros(slots, dtype=torch.int64),
            bank=c.bank,
            gates=None if gates is None else torch.ones(gates),
        )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_stream_in_two_halves_is_steered_in_place(dtype: torch.dtype, gated: bool) -> None:
    """A residual added twice, or a neighbour's two halves summed and rounded to one."""
    c = case(16, 64)
    g = torch.Generator().manual_seed(1)
    hidden, residual = c.hidden.to(dtype), torch.randn(16, 64, generator=g).to(dtype)
    c.slots[::3] = 0
    c.slots[1::3] = torch.tensor([1, 0, 0])  # nothing to add, whatever the norm
    c.bank.low_of[1] = 0
    gates = c.gates if gated else None
    # What a part at a closed gate would do is not done.
    does = (c.bank.row_of[c.slots] > 0) | (c.bank.low_of[c.slots] > 0).any(2)
    changed = (does & (gates > 0) if gates is not None else does).any(1)
    assert changed.any()
    assert not changed.all()
    expected = steer(hidden.float() + residual, c.slots, bank=c.bank, gates=gates).to(dtype)
    was = hidden.clone(), residual.clone()
    steer_stream(hidden, residual, c.slots, bank=c.bank, gates=gates)
    assert torch.equal(hidden[changed], expected[changed])
    assert torch.equal(residual[changed], torch.zeros_like(residual[changed]))
    assert torch.equal(hidden[~changed], was[0][~changed])
    assert torch.equal(residual[~changed], was[1][~changed])
    alone = was[0].clone()
    steer_stream(alone, None, c.slots, bank=c.bank, gates=gates)
    assert torch.equal(alone, steer(was[0], c.slots, bank=c.bank, gates=gates))
    with pytest.raises(ValueError, match="residual"):
        steer_stream(hidden, residual[:8], c.slots, bank=c.bank, gates=gates)


def test_adding_and_taking_away_cancels() -> None:
    """A sign lost in one of the two, or a scale applied twice."""
    c = case(8, 64)
    c.bank.rows[c.bank.row_of[4]] = -c.bank.rows[c.bank.row_of[2]]
    c.bank.low_of[[2, 4]] = 0
    there = steer(c.hidden, torch.full((8, 1), 2), bank=c.bank)
    back = steer(there, torch.full((8, 1), 4), bank=c.bank, has_norm=False)
    assert float((back - c.hidden).abs().max()) <= 1e-6 * float(c.hidden.abs().max())
    assert not torch.allclose(there, c.hidden)
    at_once = steer(c.hidden, torch.tensor([[2, 4]]).expand(8, 2), bank=c.bank)
    assert float((at_once - c.hidden).abs().max()) <= 1e-6 * float(c.hidden.abs().max())


def test_a_gradient_flows_through() -> None:
    """A kernel without a backward pass that is taken all the same gives an attribution of zero."""
    c = case(4, 16)
    hidden = c.hidden.clone().requires_grad_()
    kernels.steer(hidden, c.slots, bank=c.bank).square().sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad != 0).any())
    h = c.hidden.clone().requires_grad_()
    kernels.shift(h, torch.ones(4, 16), keeps_norm=True).square().sum().backward()
    assert h.grad is not None


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("keeps", ["none", "all", "some"])
def test_the_short_way_gives_the_ops_numbers(dtype: torch.dtype, keeps: str) -> None:
    """A faster op that forgets the norm of some tokens, or rounds twice."""
    c = case(16, 64, n_parts=1)
    c.bank.norm[:] = {"none": False, "all": True}.get(keeps, c.bank.norm)
    hidden = c.hidden.to(dtype)
    expected = steer(hidden, c.slots, bank=c.bank, has_low_rank=False)
    change = c.bank.rows[c.bank.row_of[c.slots[:, 0]]]
    asked = c.bank.norm[c.slots]
    keeps_norm = asked if keeps == "some" else keeps == "all"
    got = torch.empty_like(hidden)
    shift(hidden.float(), change, keeps_norm=keeps_norm, out=got)
    bound = BOUNDS[dtype] * float(expected.float().pow(2).mean().sqrt())
    assert float((got.float() - expected.float()).abs().max()) <= 4 * bound
    if dtype == torch.float32:
        assert torch.equal(shift(hidden, change, keeps_norm=keeps_norm), got)


def test_a_state_shifted_to_zero_stays_zero() -> None:
    """0 / 0 in the ratio of norms turns a token's state, and all that follows it, into NaN."""
    h = torch.ones(2, 8)
    assert torch.equal(shift(h, -h, keeps_norm=True), torch.zeros(2, 8))

"""Steps as they run where the op is one launch give what they give as plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_device import implemented
from toy_plans import N_LAYERS, PLANS, WIDTH, drawn

from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.steering.bank import Bank
from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep

pytestmark = pytest.mark.triton


def run(plans: list[Plan], hidden: torch.Tensor, name: Any, device: torch.device) -> Any:
    """Return what each layer leaves of a batch: a plain request, each plan's, a plain one."""
    with implemented(name, device):
        at = device if name == "triton" else torch.device("cpu")
        bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH, device=at)
        spans, requests = [Span(2)], []
        for plan in plans:
            lease = bank.acquire(plan)
            assert lease is not None
            requests.append(SteeredRequest(lease, 2))
            spans.append(Span(3, 0, requests[-1]))
        step = SteerStep(bank, [*spans, Span(1)])
        states, left = hidden.to(at), []
        for layer in range(N_LAYERS):
            states = step.apply(layer, states)
            left.append(states.cpu())
        step.finish()
        return torch.stack(left), [request.count(3) for request in requests]


def test_all_kinds_side_by_side(device: torch.device) -> None:
    """A part that the fused way forgets, or that leaks into the requests beside it."""
    plans = list(PLANS.values())
    hidden = drawn(3 * len(plans) + 3, WIDTH)
    want, counts = run(plans, hidden, "torch", device)
    got, fused_counts = run(plans, hidden, "triton", device)
    assert float((got - want).abs().max()) <= 1e-5
    assert fused_counts == counts
    assert torch.equal(got[:, :2], want[:, :2])
    assert torch.equal(got[:, -1], want[:, -1])


@pytest.mark.parametrize("kind", PLANS)
def test_a_workers_stream_in_two_halves(kind: str, device: torch.device) -> None:
    """A layer's residual that stays where hidden has it already, or a neighbour's that is lost."""
    results = []
    for name in ("torch", "triton"):
        with implemented(name, device):  # type: ignore[arg-type]
            at = device if name == "triton" else torch.device("cpu")
            worker = WorkerSteering(
                layers=range(N_LAYERS),
                n_layers=N_LAYERS,
                hidden_size=WIDTH,
                device=at,
                max_requests=2,
            )
            lease = worker.bank.acquire(PLANS[kind])
            assert lease is not None
            request = SteeredRequest(lease, 3)
            worker.step = SteerStep(worker.bank, [Span(2), Span(4, 0, request)])
            worker._wanted = worker.step.layers
            hidden, residual = drawn(8, WIDTH).to(at), drawn(8, WIDTH, seed=1).to(at)
            was = hidden.clone(), residual.clone()
            for layer in range(N_LAYERS):
                worker.at_layer(layer, hidden, residual)
            assert worker.step is not None  # nothing failed
            for now, before in zip((hidden, residual), was, strict=True):
                assert torch.equal(now[:2], before[:2])
                assert torch.equal(now[6:], before[6:])  # padding
            results.append((hidden + residual).cpu())
    assert torch.allclose(*results, atol=1e-5)
    if kind not in ("window", "prompt gate"):  # which leave these tokens alone
        assert not torch.allclose(results[0], (was[0] + was[1]).cpu(), atol=1e-3)


def test_nothing_is_uploaded_a_layer(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Slots that are copied to the device layer by layer cost more than the op itself."""
    uploads: list[Any] = []
    original = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda x: uploads.append(x) or original(x))
    with implemented("triton", device):
        bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH, device=device)
        lease = bank.acquire(PLANS["kept norm"])
        assert lease is not None
        SteerStep(bank, [Span(1), Span(1, 9, SteeredRequest(lease, 3))])
        assert len(uploads) == 1

"""Steering inside a vLLM worker, without vLLM: what arrives, what is changed, what is reported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from toy_classifier import toy_classifier
from toy_plans import MODEL, N_LAYERS, PLANS, SPECS, WIDTH, arrived, compiled, drawn, probed

from trimtab.serving.engines.vllm import worker_steering
from trimtab.serving.engines.vllm.live_request import BatchRow
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_network, packed_request, readers_of
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.steering.bank import Bank
from trimtab.steering.plan import Plan, Reader
from trimtab.steering.steered_request import Counts, SteeredRequest
from trimtab.steering.step import Span, SteerStep

MAX_REQUESTS = 3
kinds = pytest.mark.parametrize("kind", SPECS)


def worker(*, layers: Iterable[int] = range(N_LAYERS)) -> WorkerSteering:
    """Return a worker that knows every network."""
    made = WorkerSteering(
        layers=layers,
        n_layers=N_LAYERS,
        hidden_size=WIDTH,
        device="cpu",
        max_requests=MAX_REQUESTS,
    )
    for plan in PLANS.values():
        for digest, reader in readers_of(plan, probed("tone", "a")).items():
            made.learn(digest, packed_network(reader.classifier))
    return made


def admit(
    steering: WorkerSteering,
    name: str,
    plan: Plan | None,
    *,
    probes: tuple[Reader, ...] = (),
    n_prompt: int = 4,
) -> None:
    steering.admit(name, {KEY: arrived(packed_request(plan, probes))}, range(n_prompt))


def one_pass(
    steering: WorkerSteering,
    rows: list[BatchRow],
    hidden: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    layers: Iterable[int] = range(N_LAYERS),
    sampled: dict[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Send the states through all layers, in place, as a model of identities would."""
    steering.begin(rows)
    for layer in layers:
        steering.at_layer(layer, hidden, residual)
    return steering.end(sampled)


def alone(plan: Plan, hidden: torch.Tensor, *, n_prompt: int = 4) -> tuple[torch.Tensor, Counts]:
    """Return what a plan makes of a whole sequence, and its counts, without a worker."""
    bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH)
    lease = bank.acquire(plan)
    assert lease is not None
    request = SteeredRequest(lease, n_prompt)
    step = SteerStep(bank, [Span(len(hidden), 0, request)])
    for layer in range(N_LAYERS):
        hidden = step.apply(layer, hidden)
    step.finish()
    return hidden, request.count(len(hidden))


def broken(how: str) -> Any:
    carried = arrived(packed_request(PLANS["token gate"], probed("tone")))
    term = next(iter(carried["parts"][0]["layers"].values()))
    other = arrived(packed_request(PLANS["added"]))
    changes = {
        "uncompiled": lambda: None,
        "text": lambda: "a",
        "no probes": lambda: {k: v for k, v in carried.items() if k != "probes"},
        "unknown network": lambda: carried | {"probes": [["tone", 0, ["x"], "0" * 64]]},
        "cut short": lambda: term["add"].__setitem__(1, term["add"][1][:-4]),
        "one bit": lambda: term["add"].__setitem__(1, b"\x01" + term["add"][1][1:]),
        "other width": lambda: term.update(add=[[2], term["add"][1][:8]]),
        "other layer": lambda: carried["parts"][0].update(layers={str(N_LAYERS): term}),
        "other parts": lambda: carried | {"parts": other["parts"]},
        "borrowed name": lambda: carried["parts"][0].update(layers={}),
        "probe elsewhere": lambda: carried["probes"][0].__setitem__(1, N_LAYERS),
    }
    changed = changes[how]()
    return carried if changed is None and how != "uncompiled" else changed


@pytest.mark.parametrize(
    "how",
    ["uncompiled", "text", "no probes", "unknown network", "cut short", "one bit", "other width",
     "other layer", "other parts", "borrowed name", "probe elsewhere"],
)  # fmt: skip
def test_a_broken_payload_ends_its_request_alone(how: str) -> None:
    """One client's bad request stops the batch, or is answered unsteered."""
    steering = worker()
    admit(steering, "good", PLANS["added"])
    steering.admit("bad", {KEY: broken(how)}, range(4))
    before = drawn(12, WIDTH)
    hidden = before.clone()
    rows = [BatchRow("bad", 4, 0), BatchRow("good", 4, 0), BatchRow("plain", 4, 0)]
    reports = one_pass(steering, rows, hidden)
    assert set(reports) == {"bad", "good"}
    assert set(reports["bad"]) == {"failed"}
    assert reports["good"] == {"applied": True}
    assert torch.equal(hidden[4:8], alone(PLANS["added"], before[4:8])[0])
    assert torch.equal(hidden[:4], before[:4])
    assert torch.equal(hidden[8:], before[8:])
    for name in ("bad", "good"):
        steering.forget(name)
    check_empty(steering)


def check_empty(steering: WorkerSteering) -> None:
    """Nothing of any request is left, and the bank can be filled to the last place."""
    assert steering.is_idle
    stats = steering.stats()
    assert (stats["requests"], stats["slots_used"], stats["readers"]) == (0, 0, 0)
    bank = steering.bank
    assert len(bank._free_slots) == bank.max_slots
    assert len(bank._free_rows) == bank.max_rows
    assert len(bank._free_low) == bank.max_low_rank
    assert bank.goals.n_free == bank.max_guides


# --- the pass


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_state_is_steered_whatever_its_split(kind: str, dtype: torch.dtype) -> None:
    """Steering `hidden` without its residual gives gates, norms and gradients half the state."""
    plan, steering = PLANS[kind], worker()
    admit(steering, "x", plan, n_prompt=4)
    hidden, residual = drawn(11, WIDTH).to(dtype), drawn(11, WIDTH, seed=1).to(dtype)
    was = hidden.clone(), residual.clone()
    rows = [BatchRow("plain", 2, 0), BatchRow("x", 7, 0)]
    layer = min(n for part in plan.parts for n in part.layers)
    steering.begin(rows)
    for n in range(layer):
        steering.at_layer(n, hidden, residual)
    assert torch.equal(hidden, was[0])  # a gate or a probe below only reads
    steering.at_layer(layer, hidden, residual)
    whole = was[0][2:9].float() + was[1][2:9].float()
    bank = Bank(n_layers=N_LAYERS, hidden_size=WIDTH)
    lease = bank.acquire(plan)
    assert lease is not None
    step = SteerStep(bank, [Span(7, 0, SteeredRequest(lease, 4))])
    for n in range(layer):
        step.apply(n, whole)
    want = step.apply(layer, whole)
    touched = step.touched(layer)
    mine = torch.arange(7) if touched is None else touched
    others = torch.tensor([i for i in range(11) if i - 2 not in mine.tolist()])
    assert len(mine)
    assert torch.allclose(hidden[mine + 2].float(), want[mine].to(dtype).float(), atol=1e-6)
    assert not residual[mine + 2].any()
    assert torch.equal(hidden[others], was[0][others])  # the two rows of padding are among them
    assert torch.equal(residual[others], was[1][others])


def test_padding_stays_when_every_token_is_steered() -> None:
    """A step that touches all its tokens must not take the graph's padding for tokens."""
    steering = worker()
    admit(steering, "x", PLANS["kept norm"])
    hidden, residual = drawn(8, WIDTH), drawn(8, WIDTH, seed=1)
    was = hidden.clone(), residual.clone()
    one_pass(steering, [BatchRow("x", 5, 0)], hidden, residual)
    assert not torch.equal(hidden[:5], was[0][:5])
    assert torch.equal(hidden[5:], was[0][5:])
    assert torch.equal(residual[5:], was[1][5:])


USES_GUIDANCE = ("guided", "several")
STEP = "trimtab.steering.step"
ADDING = (f"{STEP}.steer", f"{STEP}.shift", f"{worker_steering.__name__}.shift")


@kinds
@pytest.mark.parametrize("where", ["adding", "plan_guidance", "probabilities", "SteerStep.finish"])
def test_an_error_in_a_pass_ends_the_steered_and_spares_the_plain(
    kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's error takes the whole engine down, or goes on as an unsteered answer."""
    steering = worker()
    admit(steering, "x", PLANS[kind])
    admit(steering, "watched", None, probes=probed("tone"))

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    was = drawn(11, WIDTH)
    hidden = was.clone()
    rows = [BatchRow("plain", 2, 0), BatchRow("x", 7, 0), BatchRow("watched", 2, 0)]
    with monkeypatch.context() as patch:
        for name in ADDING if where == "adding" else (f"{STEP}.{where}",):
            patch.setattr(name, crash)
        reports = one_pass(steering, rows, hidden)
    assert torch.equal(hidden[:2], was[:2])
    assert torch.equal(hidden[9:], was[9:])
    assert "plain" not in reports
    is_used = {"adding": kind != "guided", "plan_guidance": kind in USES_GUIDANCE}.get(where, True)
    if is_used:
        assert "out of memory" in reports["x"]["failed"]
        # What goes wrong while a pass is planned is known to be one request's.
        assert ("failed" in reports["watched"]) == (where != "plan_guidance")
        again = was.clone()
        assert "failed" in one_pass(steering, rows, again)["x"]
        assert torch.equal(again, was)
    else:
        assert reports["x"]["applied"]
        assert torch.allclose(hidden[2:9], alone(PLANS[kind], was[2:9])[0], atol=1e-6)
    for name in ("x", "watched"):
        steering.forget(name)
    check_empty(steering)
    assert (steering.failure_of("x") is not None) == is_used


def test_another_ranks_failure_is_found_by_the_apps_name() -> None:
    """A rank that answers nobody gives up on a request, and is not found by the app's own name."""
    steering = worker()
    steering.admit("chat-1-0a1b2c3d", {KEY: None}, range(4))
    steering.forget("chat-1-0a1b2c3d")
    assert "uncompiled" in str(steering.failure_of("chat-1"))
    assert steering.failure_of("chat-1-0a1b2c3d") == steering.failure_of("chat-1")
    assert steering.failure_of("chat") is None
    assert steering.failure_of("chat-10") is None


@kinds
def test_a_layer_that_is_not_run_is_a_failure(kind: str) -> None:
    """A model that skips an armed layer answers unsteered without a word."""
    steering = worker()
    admit(steering, "x", PLANS[kind])
    last = max(n for part in PLANS[kind].parts for n in part.layers)
    layers = [n for n in range(N_LAYERS) if n != last]
    hidden = drawn(9, WIDTH)
    reports = one_pass(steering, [BatchRow("x", 7, 0)], hidden, layers=layers)
    assert f"layers [{last}]" in reports["x"]["failed"]


def test_only_the_layers_of_this_worker_are_waited_for() -> None:
    """A pipeline stage that waits for another stage's layers fails every request."""
    steering = worker(layers=(2,))
    admit(steering, "x", PLANS["added"])
    was = drawn(5, WIDTH)
    hidden = was.clone()
    reports = one_pass(steering, [BatchRow("x", 5, 0)], hidden, layers=[2])
    assert reports == {"x": {"applied": True}}
    assert torch.allclose(hidden, was + drawn(N_LAYERS, WIDTH, seed=ord("a"))[2], atol=1e-6)


@kinds
def test_steps_make_what_one_pass_makes(kind: str) -> None:
    """Positions counted from the pass, or a gate forgotten between passes, move a window."""
    was = drawn(11, WIDTH)
    want, counts = alone(PLANS[kind], was, n_prompt=4)
    steering = worker()
    admit(steering, "x", PLANS[kind], n_prompt=4)
    hidden, told = was.clone(), []
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 11)):
        piece = hidden[start:stop].clone()
        reports = one_pass(steering, [BatchRow("x", stop - start, start)], piece)
        hidden[start:stop] = piece
        told.append(reports.get("x", {}))
    assert torch.allclose(hidden, want, atol=1e-6)
    assert [report.get("applied") for report in told] == [True, None, None, None]
    has_gate = any(part.gate is not None for part in PLANS[kind].parts)
    assert ("counts" in told[-1]) == has_gate
    if has_gate:
        ((n_tokens, packed),) = arrived(told[-1]["counts"])
        assert (n_tokens, Counts.unpacked(packed)) == (11, counts)


@kinds
def test_rejected_drafts_are_not_counted(kind: str) -> None:
    """Guesses that were run and thrown away appear in the receipt as steered tokens."""
    was, wrong = drawn(11, WIDTH), drawn(20, WIDTH, seed=5)
    _, counts = alone(PLANS[kind], was[:8], n_prompt=4)
    steering = worker()
    admit(steering, "x", PLANS[kind], n_prompt=4)
    one_pass(steering, [BatchRow("x", 4, 0)], was[:4].clone(), sampled={"x": 1})
    # Three guesses, of which one is right; then three, of which none is; then two, both right.
    for start, n_right, n_drafts in ((4, 1, 3), (6, 0, 3)):
        states = torch.cat([was[start : start + n_right + 1], wrong[: n_drafts - n_right]])
        row = BatchRow("x", n_drafts + 1, start, n_drafts)
        one_pass(steering, [row], states, sampled={"x": n_right + 1})
    row = BatchRow("x", 1, 7)
    report = one_pass(steering, [row], was[7:8].clone(), sampled={"x": 1}).get("x", {})
    if any(part.gate is not None for part in PLANS[kind].parts):
        ((n_tokens, packed),) = report["counts"]
        assert (n_tokens, Counts.unpacked(packed)) == (8, counts)
    else:
        assert "counts" not in report


def test_drafts_nobody_has_judged_yet_are_counted_at_every_end() -> None:
    """A host that does not wait for the device cannot say which guess was the last right one."""
    steering = worker()
    admit(steering, "x", PLANS["token gate"], n_prompt=4)
    one_pass(steering, [BatchRow("x", 4, 0)], drawn(4, WIDTH))
    report = one_pass(steering, [BatchRow("x", 3, 4, 2)], drawn(3, WIDTH, seed=1))["x"]
    assert [n for n, _ in report["counts"]] == [5, 6, 7]
    report = one_pass(steering, [BatchRow("x", 3, 5, 2)], drawn(3, WIDTH), sampled={"x": 2})["x"]
    assert [n for n, _ in report["counts"]] == [6, 7]


@kinds
def test_a_preempted_request_gives_its_slots_and_comes_back(kind: str) -> None:
    """Slots kept while waiting block the bank; a gate decided anew may decide otherwise."""
    was = drawn(6, WIDTH)
    want, _ = alone(PLANS[kind], was, n_prompt=4)
    steering = worker()
    admit(steering, "x", PLANS[kind], n_prompt=4)
    one_pass(steering, [BatchRow("x", 4, 0)], was[:4].clone())
    steering.preempt("x")
    steering.preempt("x")
    assert steering.stats()["slots_used"] == 0
    admit(steering, "other", compiled("3 c"))  # takes the slots that were free
    one_pass(steering, [BatchRow("other", 2, 0)], drawn(2, WIDTH))
    hidden = was.clone()
    steering.begin([BatchRow("other", 1, 2), BatchRow("x", 6, 0)])
    batch = torch.cat([drawn(1, WIDTH), hidden])
    for layer in range(N_LAYERS):
        steering.at_layer(layer, batch, None)
    reports = steering.end()
    assert "failed" not in reports.get("x", {})
    assert torch.allclose(batch[1:], want, atol=1e-6)
    for name in ("x", "other"):
        steering.forget(name)
    check_empty(steering)


def test_a_gate_that_needs_the_prompt_whole_fails_when_it_is_split() -> None:
    """Half a prompt's mean decides for the whole answer."""
    steering = worker()
    admit(steering, "x", PLANS["prompt gate"], n_prompt=4)
    admit(steering, "y", PLANS["added"], n_prompt=4)
    was = drawn(6, WIDTH)
    hidden = was.clone()
    reports = one_pass(steering, [BatchRow("x", 2, 0), BatchRow("y", 4, 0)], hidden)
    assert "SplitPromptError" in reports["x"]["failed"]
    assert reports["y"] == {"applied": True}
    assert torch.equal(hidden[2:], alone(PLANS["added"], was[2:])[0])


def test_probes_read_the_last_token_of_a_pass() -> None:
    """Readings of another request, or of the steered state."""
    steering, probes = worker(), probed("tone", "a")
    admit(steering, "x", PLANS["added"], probes=probes)
    was = drawn(6, WIDTH)
    rows = [BatchRow("plain", 2, 0), BatchRow("x", 4, 0)]
    reports = one_pass(steering, rows, was.clone())
    network = toy_classifier(MODEL, layers=(0, 1)).at(0)
    z = (was[5] @ network.w_in.T + network.b_in).relu()
    z = (z @ network.w_mid.T + network.b_mid).relu()
    want = (z @ network.w_out.T + network.b_out).softmax(0)
    assert reports["x"]["probes"][0] == pytest.approx(want.tolist(), abs=1e-5)
    assert len(reports["x"]["probes"][1]) == 1


def test_measuring_reads_every_token_of_every_layer_and_changes_none() -> None:
    """A profile of a part of the model scales every dose."""
    steering = worker()
    extra = {KEY: arrived(packed_request(None, measures=True))}
    steering.admit("m", extra, range(3))
    admit(steering, "x", PLANS["added"])
    hidden, residual = drawn(9, WIDTH), drawn(9, WIDTH, seed=2)
    norms = (hidden + residual)[4:7].norm(dim=1).tolist()
    rows = [BatchRow("x", 4, 0), BatchRow("m", 3, 0)]
    reports = one_pass(steering, rows, hidden, residual)
    assert reports["m"] == {"applied": True}
    assert steering.take_norms() == {}
    steering.forget("m")
    measured = steering.take_norms()["m"]
    assert set(measured) == set(range(N_LAYERS))
    for values in measured.values():
        assert values == pytest.approx(norms, rel=1e-6)
    assert steering.take_norms() == {}


def test_networks_are_kept_by_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that forgets what the app believes it knows fails a good request."""
    monkeypatch.setattr(worker_steering, "KEPT_NETWORKS", 2)
    steering = WorkerSteering(
        layers=[0], n_layers=1, hidden_size=WIDTH, device="cpu", max_requests=1
    )
    packed = packed_network(toy_classifier(MODEL).at(1))
    steering.learn("first", packed)
    steering.learn("second", packed)
    steering._network("first")
    steering.learn("third", packed)
    steering._network("first")
    with pytest.raises(KeyError):
        steering._network("second")


def test_an_idle_worker_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost for every unsteered pass."""
    steering = worker()
    monkeypatch.setattr(worker_steering, "SteerStep", None)
    was = drawn(4, WIDTH)
    hidden = was.clone()
    assert one_pass(steering, [BatchRow("plain", 4, 0)], hidden) == {}
    admit(steering, "x", PLANS["added"])
    steering.forget("x")
    assert one_pass(steering, [BatchRow("plain", 4, 0)], hidden) == {}
    assert torch.equal(hidden, was)

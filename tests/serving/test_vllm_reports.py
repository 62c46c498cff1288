"""What the workers say on its way to the app, and what the runners say to the workers."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from types import SimpleNamespace as Fake
from typing import Any

import numpy as np
import pytest
import torch
from toy_chat import byte_tokenizer
from toy_plans import N_LAYERS, PLANS, WIDTH, arrived, drawn

from trimtab.serving.detokenizer import TokenText
from trimtab.serving.engines.base import Delta, EngineError, Request
from trimtab.serving.engines.vllm.answer import Answer
from trimtab.serving.engines.vllm.engine import VllmEngine
from trimtab.serving.engines.vllm.live_request import BatchRow
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_request
from trimtab.serving.engines.vllm.reports import ATTRIBUTE, FIELD, INBOXES, Inbox, Pending, lift_off
from trimtab.serving.engines.vllm.runner_hooks import hook_runner
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.steered_request import Counts

# --- the scheduler's process


class Scheduler:
    """As much of vLLM's scheduler as ends requests and names their blocks."""

    def __init__(self, *names: str) -> None:
        self.requests = {
            name: Fake(request_id=name, client_index=i, get_finished_reason=lambda: "error")
            for i, name in enumerate(names)
        }
        self.evicted: set[int] = set()
        self.kv_cache_manager = Fake(
            get_block_ids=lambda name: ([ord(name), 1], [2]), evict_blocks=self.evicted.update
        )

    def finish_requests(self, names: Any, status: Any) -> list[Any]:
        assert status == "failed"
        return [self.requests.pop(name) for name in sorted(names) if name in self.requests]


class Outputs:
    """vLLM's `EngineCoreOutputs`."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs


@pytest.fixture(autouse=True)
def small_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the two modules of vLLM that ending a request needs."""
    request, engine = ModuleType("vllm.v1.request"), ModuleType("vllm.v1.engine")
    request.RequestStatus = Fake(FINISHED_ERROR="failed")  # type: ignore[attr-defined]
    engine.EngineCoreOutput = Fake  # type: ignore[attr-defined]
    engine.EngineCoreOutputs = Outputs  # type: ignore[attr-defined]
    for module in (request, engine):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def output_of(name: str, n: int = 1) -> Fake:
    return Fake(request_id=name, new_token_ids=list(range(n)), kv_transfer_params=None)


def updated(
    pending: Pending, scheduler: Scheduler, reports: dict[str, Any] | None, *names: str
) -> dict[int, Outputs]:
    """Send one pass's reports through; `names` get a token, if they still run."""

    def original(scheduler: Any, scheduled: Any, output: Any) -> dict[int, Outputs]:
        running = [name for name in names if name in scheduler.requests]
        return {0: Outputs([output_of(name) for name in running])}

    output = Fake() if reports is None else Fake(**{ATTRIBUTE: reports})
    found: dict[int, Outputs] = pending.update(scheduler, None, output, original)
    return found


def riding(outputs: dict[int, Outputs]) -> dict[str, Any]:
    return {
        one.request_id: one.kv_transfer_params and one.kv_transfer_params[FIELD]
        for group in outputs.values()
        for one in group.outputs
    }


def test_reports_ride_with_their_own_tokens() -> None:
    """A report on another request's token, or on none, is a receipt for somebody else."""
    pending, scheduler = Pending(), Scheduler("x", "y", "plain")
    outputs = updated(pending, scheduler, {"y": {"applied": True}}, "x", "y", "plain")
    assert riding(outputs) == {"x": None, "y": {"applied": True}, "plain": None}
    assert riding(updated(pending, scheduler, None, "x", "y")) == {"x": None, "y": None}


def test_a_report_waits_for_its_requests_token() -> None:
    """A prompt in pieces gives no token at first; what its first piece reported is lost."""
    pending, scheduler = Pending(), Scheduler("x", "gone")
    updated(pending, scheduler, {"x": {"applied": True, "counts": [1]}, "gone": {"applied": True}})
    updated(pending, scheduler, {"x": {"counts": [2]}})
    del scheduler.requests["gone"]
    outputs = updated(pending, scheduler, None, "x")
    assert riding(outputs) == {"x": {"applied": True, "counts": [2]}}
    assert not pending._held


def test_other_connectors_keep_what_they_sent() -> None:
    """A transfer of keys and values that loses its parameters to us."""
    pending, scheduler = Pending(), Scheduler("x")
    theirs = output_of("x")
    theirs.kv_transfer_params = {"block": 3}
    output = Fake(**{ATTRIBUTE: {"x": {"applied": True}}})
    pending.update(scheduler, None, output, lambda *_: {0: Outputs([theirs])})
    processor = Fake(request_states={"x": Fake(external_req_id="mine")})
    lift_off(processor, [theirs])
    assert theirs.kv_transfer_params == {"block": 3}


def test_a_failed_request_ends_before_its_token_counts() -> None:
    """A token chosen from unsteered states reaches the client of a steered request."""
    pending, scheduler = Pending(), Scheduler("a", "b")
    outputs = updated(pending, scheduler, {"a": {"failed": "no room"}}, "a", "b")
    assert set(scheduler.requests) == {"b"}
    assert riding(outputs) == {"b": None, "a": {"failed": "no room"}}
    (ended,) = [one for group in outputs.values() for one in group.outputs if one.request_id == "a"]
    assert ended.new_token_ids == []
    assert ended.finish_reason == "error"
    again = updated(pending, scheduler, {"a": {"failed": "no room"}}, "b")
    assert riding(again) == {"b": None}


def test_a_failed_requests_blocks_leave_the_prefix_cache() -> None:
    """They are known as steered and are not: the retry reads them and is answered unsteered."""
    pending, scheduler = Pending(), Scheduler("a", "b")
    updated(pending, scheduler, {"a": {"failed": "no room"}}, "a", "b")
    assert scheduler.evicted == {ord("a"), 1, 2}


# --- the app's process


def test_an_inbox_gets_what_was_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that stays in vLLM's output is shown to the client, or is lost with it."""
    inbox = Inbox()
    monkeypatch.setitem(INBOXES, "mine", inbox)
    processor = Fake(request_states={"x-0a1b": Fake(external_req_id="mine")})
    counts = [Counts(n, (n,), (n,), {0: 1.0}) for n in (5, 6, 7)]
    reports = [
        {"applied": True, "counts": [[5, counts[0].packed()]], "probes": [[0.5]]},
        {"counts": [[6, counts[1].packed()], [7, counts[2].packed()]], "probes": [[0.6]]},
    ]
    for report in reports:
        one = output_of("x-0a1b")
        one.kv_transfer_params = {FIELD: arrived(report)}
        lift_off(processor, [one, output_of("another")])
        assert one.kv_transfer_params is None
    assert (inbox.is_applied, inbox.failure) == (True, None)
    assert inbox.probes == [[[0.5]], [[0.6]]]
    assert inbox.latched == {0: 1.0}
    assert inbox.counts_at(6) == counts[1]
    assert set(inbox.counts) == {6, 7}
    assert inbox.counts_at(8) is None


def answered(kind: str, inbox: Inbox, text: str, *, stop: tuple[str, ...] = ()) -> Delta:
    """Return the last delta of an answer to a prompt of 4 tokens that came in one piece."""
    tokenizer = byte_tokenizer()
    request = Request("x", (1, 2, 3, 4), SamplingParams(max_tokens=9, stop=stop), plan=PLANS[kind])
    answer = Answer(request, inbox, tokenizer, marks=None, text=TokenText(tokenizer))
    made = Fake(
        token_ids=tokenizer(text)["input_ids"],
        finish_reason="length",
        stop_reason=None,
        logprobs=(),
    )
    delta = answer.delta(Fake(outputs=[made], num_cached_tokens=0, prompt_logprobs=None))
    assert delta is not None
    return delta


def gated_inbox(*ends: int) -> Inbox:
    inbox = Inbox()
    counts = [[n, Counts(n - 1, (n,), (n - 1,), {}).packed()] for n in ends]
    inbox.take({"applied": True, "counts": counts})
    return inbox


def test_a_receipt_ends_where_the_answer_does() -> None:
    """Tokens run past a stop string, or past the last one asked for, are counted as steered."""
    whole = answered("token gate", gated_inbox(4, 5, 6, 7, 8, 9), "hello")
    assert whole.steering is not None
    assert whole.steering["steered_tokens"] == 7  # 4 of the prompt, 4 that were run, 1 shut
    cut = answered("token gate", gated_inbox(4, 5, 6, 7, 8, 9), "hello", stop=("l",))
    assert cut.text == "he"
    assert cut.steering is not None
    assert cut.steering["steered_tokens"] == 5
    ungated = answered("added", gated_inbox(), "hello", stop=("l",))
    assert ungated.steering == {"steered_tokens": 6, "gates": []}


def test_a_gate_without_an_account_fails_the_answer() -> None:
    """A receipt made up of a window, for a gate that nobody has read."""
    for kind in ("token gate", "prompt gate"):
        with pytest.raises(EngineError, match="no account"):
            answered(kind, gated_inbox(), "hello")
    with pytest.raises(EngineError, match="no account"):
        answered("added", Inbox(), "hello")


def test_a_prompts_gate_is_counted_to_the_end_of_the_answer() -> None:
    """Once decided it needs no report a token, which could be missing."""
    for decision, n_steered in ((1.0, 8), (0.0, 0)):
        inbox = Inbox()
        inbox.take(
            {"applied": True, "counts": [[4, Counts(0, (4,), (0,), {0: decision}).packed()]]}
        )
        receipt = answered("prompt gate", inbox, "hello").steering
        assert receipt is not None
        assert receipt["steered_tokens"] == n_steered
        assert receipt["gates"][0]["fired"] == bool(decision)


def test_an_answer_ends_well_only_if_every_worker_says_so() -> None:
    """A rank whose reports ride with no token gives up, and its request gets a receipt."""
    said: list[str | None] = [None, None]
    asked: list[Any] = []

    async def rpc(method: str, *, args: Any) -> list[str | None]:
        asked.append((method, args))
        return said

    async def forget() -> None:
        asked.append("reset")

    engine = VllmEngine("toy")
    engine._llm = Fake(collective_rpc=rpc, reset_prefix_cache=forget)
    engine._served = served = Fake(n_workers=1)
    request = Request("x", (1,), SamplingParams())
    asyncio.run(engine._ask_all(request))
    assert asked == []
    served.n_workers = 2
    asyncio.run(engine._ask_all(request))
    assert asked == [("trimtab_failure_of", ("x",))]
    said[1] = "RuntimeError: out of memory"
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(engine._ask_all(request))
    assert asked[-1] == "reset"


# --- the worker's process


class Runner:
    """As much of vLLM's first model runner as is watched: rows of hidden states through layers."""

    use_async_scheduling = False

    def __init__(self, steering: WorkerSteering) -> None:
        self._steering = steering
        self.input_batch: Any = None
        self.states = torch.zeros(0, WIDTH)

    def execute_model(self, scheduled: Any, intermediate_tensors: Any = None) -> None:
        names = list(scheduled.num_scheduled_tokens)
        self.input_batch = Fake(
            req_ids=names,
            num_reqs=len(names),
            num_computed_tokens_cpu=np.array([scheduled.starts[n] for n in names] + [99]),
            token_ids_cpu=np.zeros((len(names), 32), dtype=np.int64),
        )
        self._prepare_inputs(scheduled, None)
        self._run(sum(scheduled.num_scheduled_tokens.values()))

    def _run(self, n_tokens: int) -> None:
        self.states = drawn(n_tokens, WIDTH)
        for layer in range(N_LAYERS):
            self._steering.at_layer(layer, self.states, None)

    def _prepare_inputs(self, scheduled: Any, num_scheduled_tokens: Any) -> None:
        pass

    def _dummy_run(self, num_tokens: int) -> torch.Tensor:
        self._run(num_tokens)
        return self.states

    def sample_tokens(self, grammar_output: Any) -> Any:
        names = self.input_batch.req_ids
        return Fake(req_ids=names, sampled_token_ids=[[1] for _ in names])


class AsyncRunner(Runner):
    """One whose tokens are still on their way when `sample_tokens` returns."""

    use_async_scheduling = True

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return Fake(get_output=lambda: output)


class SecondRunner(Runner):
    """vLLM's second runner: other names, dummies through `execute_model`."""

    def execute_model(
        self, scheduled: Any, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> None:
        names = list(scheduled.num_scheduled_tokens)
        self.input_batch = Fake(req_ids=names)
        if not dummy_run:
            self.prepare_inputs(scheduled, None, None)
        self._run(sum(scheduled.num_scheduled_tokens.values()))

    def prepare_inputs(self, scheduled: Any, *more: Any) -> Any:
        counts = scheduled.num_scheduled_tokens
        return Fake(
            req_ids=list(counts),
            query_start_loc_np=np.array([0, *np.cumsum(list(counts.values()))]),
            num_computed_tokens_np=np.array([scheduled.starts[name] for name in counts]),
        )


runners = pytest.mark.parametrize("kind", [Runner, AsyncRunner, SecondRunner])


def watched(kind: type[Runner]) -> tuple[Runner, WorkerSteering]:
    steering = WorkerSteering(
        layers=range(N_LAYERS),
        n_layers=N_LAYERS,
        hidden_size=WIDTH,
        device="cpu",
        max_requests=3,
    )
    runner = kind(steering)
    hook_runner(runner, steering)
    return runner, steering


def scheduled(
    *new: str,
    counts: dict[str, tuple[int, int]],
    finished: set[str] | None = None,
    preempted: set[str] | None = None,
    drafts: dict[str, list[int]] | None = None,
) -> Fake:
    """Return a scheduler's output: `counts` is how many tokens of each request, and from where."""
    extra = {KEY: arrived(packed_request(PLANS["added"]))}
    plain = Fake(extra_args=None)
    return Fake(
        scheduled_new_reqs=[
            Fake(
                req_id=name,
                prompt_token_ids=[1] * 4,
                sampling_params=plain if name.startswith("plain") else Fake(extra_args=extra),
            )
            for name in new
        ],
        finished_req_ids=finished or set(),
        preempted_req_ids=preempted,
        num_scheduled_tokens={name: n for name, (n, _) in counts.items()},
        starts={name: start for name, (_, start) in counts.items()},
        scheduled_spec_decode_tokens=drafts or {},
    )


def reports_of(runner: Runner) -> Any:
    output = runner.sample_tokens(None)
    if hasattr(output, "get_output"):
        output = output.get_output()
    return getattr(output, ATTRIBUTE, None)


def changed(runner: Runner) -> list[bool]:
    """Return which tokens of the last pass are not what the model made."""
    return (runner.states != drawn(len(runner.states), WIDTH)).any(1).tolist()


@runners
def test_each_token_is_steered_by_its_own_request(kind: type[Runner]) -> None:
    """Rows told before the batch was final steer a neighbour."""
    runner, steering = watched(kind)
    runner.execute_model(scheduled("x", "plain", counts={"plain": (3, 0), "x": (4, 0)}))
    assert changed(runner) == [False] * 3 + [True] * 4
    assert reports_of(runner) == {"x": {"applied": True}}
    runner.execute_model(scheduled("y", counts={"y": (4, 0), "plain": (1, 3), "x": (1, 4)}))
    assert changed(runner) == [True] * 4 + [False, True]
    assert reports_of(runner) == {"y": {"applied": True}}
    done = {"x", "y"}
    runner.execute_model(scheduled(counts={"plain": (1, 4)}, finished=done))
    assert changed(runner) == [False]
    assert reports_of(runner) is None
    assert steering.is_idle


@runners
def test_a_preempted_request_is_steered_when_it_resumes(kind: type[Runner]) -> None:
    """Slots lost with the preemption leave the rest of the answer unsteered."""
    runner, steering = watched(kind)
    runner.execute_model(scheduled("x", counts={"x": (4, 0)}))
    reports_of(runner)
    runner.execute_model(scheduled("plain", counts={"plain": (4, 0)}, preempted={"x"}))
    assert steering.stats()["slots_used"] == 0
    assert reports_of(runner) is None
    again = ["x"] if kind is SecondRunner else []  # it comes again as a new one
    runner.execute_model(scheduled(*again, counts={"plain": (1, 4), "x": (5, 0)}))
    assert changed(runner) == [False] + [True] * 5
    assert steering.stats()["slots_used"] == 1
    assert steering.stats()["requests"] == 1


@runners
def test_dummy_passes_are_never_steered(kind: type[Runner]) -> None:
    """A profile, or a captured graph, made under the last pass's steering."""
    runner, steering = watched(kind)
    runner.execute_model(scheduled("x", counts={"x": (4, 0)}))
    assert changed(runner) == [True] * 4
    if isinstance(runner, SecondRunner):
        runner.execute_model(scheduled(counts={"x": (4, 0)}), None, True)
    else:
        runner._dummy_run(4)
    assert changed(runner) == [False] * 4
    assert steering.step is None


@runners
def test_rows_know_their_drafts(kind: type[Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts taken for tokens are counted although they were rejected."""
    runner, steering = watched(kind)
    seen: list[BatchRow] = []
    monkeypatch.setattr(steering, "begin", seen.extend)
    runner.execute_model(
        scheduled(
            "x", "plain", counts={"x": (3, 7), "plain": (1, 9)}, drafts={"x": [5, 6], "plain": []}
        )
    )
    assert [(r.id, r.n_tokens, r.start, r.n_drafts) for r in seen] == [
        ("x", 3, 7, 2),
        ("plain", 1, 9, 0),
    ]
    assert all((r.ids is not None) == (kind is Runner) for r in seen)


def test_an_output_shared_by_passes_is_not_written_on() -> None:
    """One pass's report found again on vLLM's constant empty output."""
    empty = Fake(req_ids=[], sampled_token_ids=[])
    runner, steering = Runner(None), watched(Runner)[1]  # type: ignore[arg-type]
    runner._steering = steering
    runner.sample_tokens = lambda _: empty  # type: ignore[method-assign]
    hook_runner(runner, steering)
    runner.execute_model(scheduled("x", counts={"x": (4, 0)}))
    assert reports_of(runner) == {"x": {"applied": True}}
    assert not hasattr(empty, ATTRIBUTE)

"""Steering on vLLM's own server, without vLLM: the guard, the watch over answers, the receipt."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from serving_fakes import LAYERS, model_ref, toy_vector

from trimtab.serving.engines.vllm import plain_answers, plain_vllm
from trimtab.serving.engines.vllm.plain_answers import RECEIPT, TICKET, Asked, follow, ticket_for
from trimtab.serving.engines.vllm.plain_steering import environment_settings, public_name
from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY, PRESET, packed_request
from trimtab.serving.engines.vllm.reports import FIELD, lift_off
from trimtab.serving.engines.vllm.support import Support
from trimtab.serving.engines.vllm.unheard import Listener
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.errors import ModelLoadError, SpecError
from trimtab.steering.plan import Plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.store import Store


class ValidationFault(ValueError):
    """Stands in for vLLM's error with a parameter."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class FaultWithStatus(Exception):
    """Stands in for vLLM's error with a status."""

    def __init__(self, message: str, status: HTTPStatus) -> None:
        super().__init__(message)
        self.status = status


@pytest.fixture(autouse=True)
def exceptions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's exceptions, so that no vLLM is needed."""
    vllm, made = ModuleType("vllm"), ModuleType("vllm.exceptions")
    made.VLLMValidationError = ValidationFault  # type: ignore[attr-defined]
    made.GracefulHTTPError = FaultWithStatus  # type: ignore[attr-defined]
    vllm.exceptions = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", made)
    return made


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path, 0.5)


def planned(folder: Path, scale: float) -> Plan:
    import torch

    store = Store(folder)
    store.put_vector(toy_vector("kind", ref=model_ref(), size=0.5, seed=1))
    return compile_plan(
        parse_spec({"vectors": [{"id": "kind", "scale": scale}]}),
        store,
        model=model_ref(),
        hidden_norms=torch.ones(LAYERS),
        limits=Limits(max_dose=None),
    )


SUPPORT = Support(n_stages=1, n_drafts=0, knows_tokens=True, max_pass=512, sentences={})
SERVED: Any = SimpleNamespace(support=SUPPORT, marks=None)


# --- vLLM's frontend, as much of it as is used


class Record:
    """Like `RequestState`."""

    def __init__(self, request: Any, parent: Any, index: int, queue: Any) -> None:
        self.request_id, self.external_req_id = request.request_id, "the client's"
        self.prompt_token_ids = request.prompt_token_ids
        self.parent_req, self.request_index, self.queue = parent, index, queue
        self.detokenizer = SimpleNamespace(output_token_ids=[])

    def make_request_output(
        self, new: Any, pooling: Any, reason: Any, stop: Any, params: Any = None
    ) -> Any:
        return SimpleNamespace(new=new, reason=reason, params=params)


class Frontend:
    """Like `OutputProcessor`, for one queue."""

    def __init__(self) -> None:
        self.request_states: dict[str, Record] = {}
        self.answers: list[Any] = []
        self.queue = SimpleNamespace(put=self.answers.append)

    def add(self, request: Any, prompt: Any, parent: Any, index: int, queue: Any) -> None:
        self.request_states[request.request_id] = Record(request, parent, index, queue)

    def abort_requests(self, names: list[str], *, internal: bool) -> list[str]:
        assert internal
        mine = [
            name
            for name, record in self.request_states.items()
            if name in names or getattr(record.parent_req, "request_id", None) in names
        ]
        for name in mine:
            del self.request_states[name]
        return mine

    def outputs(self, outputs: list[Any]) -> Any:
        for one in outputs:
            record = self.request_states.get(one.request_id)
            if record is not None:
                record.detokenizer.output_token_ids += one.new_token_ids
                made = record.make_request_output(
                    one.new_token_ids, None, one.finish_reason, None, one.kv_transfer_params
                )
                self.answers.append(made)
        return SimpleNamespace(reqs_to_abort=[])

    def step(self, *outputs: Any) -> Any:
        """What `plugin.py` makes of `process_outputs`."""
        lift_off(self, list(outputs))
        original = Frontend.outputs
        return plain_answers.process(original, self, list(outputs))


def added(frontend: Frontend, plan: Plan, *, n: int = 1, embeds: Any = None) -> None:
    parent = SimpleNamespace(request_id="parent") if n > 1 else None
    with ticket_for(Asked(plan, SERVED, "vllm_xargs.steering")) as ticket:
        for index in range(n):
            request = SimpleNamespace(
                request_id=f"r{index}",
                prompt_token_ids=[1, 2, 3],
                prompt_embeds=embeds,
                sampling_params=SimpleNamespace(extra_args={TICKET: ticket}),
            )
            follow(Frontend.add, frontend, request, None, parent, index, frontend.queue)


def output(name: str = "r0", *tokens: int, report: Any = None, reason: Any = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        new_token_ids=list(tokens),
        finish_reason=reason,
        kv_transfer_params=None if report is None else {FIELD: report},
    )


APPLIED = {"applied": True}


def test_the_last_output_has_the_receipt(plan: Plan) -> None:
    """Catches a receipt on every token, on none, or one that counts the token not run."""
    frontend = Frontend()
    added(frontend, plan)
    frontend.step(output("r0", 7, report=APPLIED))
    frontend.step(output("r0", 8, reason="stop"))
    first, last = frontend.answers
    assert first.params is None
    found = last.params[RECEIPT]
    assert found["fingerprint"] == plan.receipt["fingerprint"]
    assert found["choices"] == [{"index": 0, "steered_tokens": 4, "gates": []}]


def test_a_connectors_own_parameters_stay(plan: Plan) -> None:
    """Catches a receipt that replaces what a KV connector has to say."""
    frontend = Frontend()
    added(frontend, plan)
    one = output("r0", 7, report=APPLIED, reason="stop")
    one.kv_transfer_params["remote"] = 1
    frontend.step(one)
    assert set(frontend.answers[0].params) == {"remote", RECEIPT}


def test_tokens_nobody_vouches_for_never_arrive(plan: Plan) -> None:
    """Catches unsteered text in a 200, the bug that nobody sees."""
    frontend = Frontend()
    added(frontend, plan)
    result = frontend.step(output("r0", 7))
    assert [type(answer) for answer in frontend.answers] == [FaultWithStatus]
    assert result.reqs_to_abort == ["r0"]
    assert not frontend.request_states


def test_a_failed_choice_ends_its_siblings(plan: Plan) -> None:
    """Catches choices that run on for a client who already has an error."""
    frontend = Frontend()
    added(frontend, plan, n=2)
    frontend.step(output("r0", 7, report=APPLIED), output("r1", 7, report=APPLIED))
    frontend.answers.clear()
    result = frontend.step(output("r1", report={"failed": "no room"}), output("r0", 8))
    assert [str(answer) for answer in frontend.answers] == [
        "The steering of this request failed: no room."
    ]
    assert sorted(result.reqs_to_abort) == ["r0", "r1"]


def test_a_split_prompt_may_be_tried_again(plan: Plan) -> None:
    """Catches a 500 for what only the load of the moment was in the way of."""
    frontend = Frontend()
    added(frontend, plan)
    frontend.step(output("r0", report={"failed": "SplitPromptError: again"}))
    assert frontend.answers[0].status == HTTPStatus.SERVICE_UNAVAILABLE


def test_every_choice_is_in_the_receipt(plan: Plan) -> None:
    """Catches a receipt of the choice that happened to end last."""
    frontend = Frontend()
    added(frontend, plan, n=2)
    frontend.step(output("r1", 7, report=APPLIED, reason="stop"))
    frontend.step(output("r0", 7, 8, report=APPLIED, reason="stop"))
    choices = frontend.answers[-1].params[RECEIPT]["choices"]
    assert [(c["index"], c["steered_tokens"]) for c in choices] == [(0, 4), (1, 3)]


def test_a_plan_without_parts_waits_for_no_report(tmp_path: Path) -> None:
    """Catches scale 0 ending in an error because no worker had anything to say."""
    frontend = Frontend()
    added(frontend, planned(tmp_path, 0.0))
    frontend.step(output("r0", 7, reason="stop"))
    assert frontend.answers[0].params[RECEIPT]["choices"][0]["steered_tokens"] == 0


def test_a_prompt_of_embeddings_is_refused(plan: Plan) -> None:
    """Catches a window that is laid over a prompt of length 0."""
    frontend = Frontend()
    with pytest.raises(SpecError, match="embeddings"):
        added(frontend, plan, embeds=object())
    assert not frontend.request_states


def test_a_ticket_is_good_for_one_request(plan: Plan) -> None:
    """Catches what a request asked for being kept, or found, after it was added."""
    frontend = Frontend()
    with ticket_for(Asked(plan, SERVED, "")) as ticket:
        pass
    request = SimpleNamespace(
        request_id="late",
        prompt_token_ids=[1],
        sampling_params=SimpleNamespace(extra_args={TICKET: ticket}),
    )
    follow(Frontend.add, frontend, request, None, None, 0, frontend.queue)
    assert not hasattr(frontend.request_states["late"], plain_answers.ANSWER)


def test_other_requests_are_not_touched() -> None:
    """Catches a watch over requests that asked for nothing."""
    frontend = Frontend()
    request = SimpleNamespace(request_id="r0", prompt_token_ids=[1], sampling_params=None)
    follow(Frontend.add, frontend, request, None, None, 0, frontend.queue)
    frontend.step(output("r0", 7, reason="stop"))
    assert frontend.answers[0].params is None


# --- the guard


class Llm:
    """Like `AsyncLLM` with two workers: says what reached it."""

    failures: dict[str, str]

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncIterator[Any]:
        yield SimpleNamespace(finished=False)
        yield SimpleNamespace(finished=True)

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[str | None]:
        assert method == "trimtab_failure_of"
        return [None, self.failures.get(args[0])]

    async def reset_prefix_cache(self) -> None:
        self.failures["the cache"] = "reset"

    async def add_request(self, request_id: str, prompt: Any, params: Any) -> Any:
        return params.extra_args


@pytest.mark.parametrize("asks", [True, False])
def test_an_answer_ends_well_only_if_every_worker_says_so(
    monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """A rank that could not steer, behind one that could: 200 with half the steering."""

    class Guarded(Llm):
        pass

    async def served() -> Any:
        return SimpleNamespace(n_workers=2)

    monkeypatch.setattr(
        "trimtab.serving.engines.vllm.plain_steering.steering_of",
        lambda llm: SimpleNamespace(served=served),
    )
    plain_vllm._guard_server(Guarded, is_on=True)
    llm = Guarded.__new__(Guarded)
    params = SimpleNamespace(extra_args={ASKED: "kind"} if asks else None)

    async def ends() -> list[bool]:
        return [one.finished async for one in llm.generate("Hi", params, request_id="r")]

    llm.failures = {}
    assert asyncio.run(ends()) == [False, True]
    llm.failures = {"r": "RuntimeError: out of memory"}
    if not asks:
        assert asyncio.run(ends()) == [False, True]
        return
    with pytest.raises(Exception, match="out of memory"):
        asyncio.run(ends())
    assert llm.failures["the cache"] == "reset"


def through_guard(extra: Any, *, is_on: bool = True, prompt: Any = "Hi") -> Any:
    class Guarded(Llm):
        pass

    plain_vllm._guard_server(Guarded, is_on=is_on)
    llm = Guarded.__new__(Guarded)
    params = SimpleNamespace(extra_args=extra)
    return asyncio.run(llm.add_request("r", prompt, params))


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("extra", [None, {}, {"other": 1}])
def test_the_guard_lets_plain_requests_pass(extra: Any, is_on: bool) -> None:
    """Catches a guard that refuses what has nothing to do with it."""
    assert through_guard(extra, is_on=is_on) == extra


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize(
    "extra", [{KEY: {"parts": []}}, {KEY: "x", ASKED: "kind"}, {TICKET: "0123"}]
)
def test_clients_cannot_use_our_inner_keys(extra: Any, is_on: bool) -> None:
    """Catches steering that was never compiled, so neither checked nor bounded."""
    with pytest.raises(ValidationFault, match="not for clients") as caught:
        through_guard(extra, is_on=is_on)
    assert caught.value.parameter.startswith("vllm_xargs.trimtab")


def test_our_own_engine_passes() -> None:
    """Catches a guard that takes our own compiled request for a client's."""
    packed = packed_request(None, measures=True)
    assert through_guard({KEY: packed}) == {KEY: packed}


@pytest.mark.parametrize("extra", [{ASKED: "kind"}, {PRESET: "mild"}])
def test_switched_off_it_refuses_who_asks(extra: Any) -> None:
    """Catches a kill switch that answers unsteered."""
    with pytest.raises(ValidationFault, match="TRIMTAB_VLLM=off"):
        through_guard(extra, is_on=False)


def test_a_prompt_in_pieces_is_refused() -> None:
    """Catches a stream of prompts whose later pieces nobody compiled steering for."""

    async def pieces() -> Any:
        yield "a"

    with pytest.raises(ValidationFault, match="pieces"):
        through_guard({ASKED: "kind"}, prompt=pieces())


def test_the_offline_class_refuses() -> None:
    """Catches `LLM.generate` running unsteered."""

    class Engine:
        def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
            return "added"

    plain_vllm._guard_offline(Engine)
    assert Engine().add_request("r", "Hi", SimpleNamespace(extra_args=None)) == "added"
    with pytest.raises(SpecError, match="LLM class"):
        Engine().add_request("r", "Hi", SimpleNamespace(extra_args={ASKED: "kind"}))


# --- what would be lost on the way


def heard(path: str, body: Any, *, kind: str = "application/json") -> tuple[int, bytes]:
    """Send a body through the listener; return the status and what the app inside read of it."""
    inside = b""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal inside
        inside, more = b"", True
        while more:
            message = await receive()
            inside, more = inside + message["body"], message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    data = json.dumps(body).encode()
    parts = [data[:5], data[5:]]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(Listener(app)(scope, receive, send))
    return sent[0]["status"], inside


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": "steering is fun"}, 200),
        ("/v1/chat/completions", {"vllm_xargs": {"steering": "kind"}}, 200),
        ("/v1/chat/completions", {"steering": None}, 200),
        ("/v1/chat/completions", {"steering": {"vectors": []}}, 400),
        ("/v1/chat/completions", {"probes": ["tone"]}, 400),
        ("/v1/chat/completions", {"vllm_xargs": {"trimtab": "x"}}, 400),
        ("/cohere/v2/chat", {"vllm_xargs": {"steering": "kind"}}, 400),
        ("/cohere/v2/chat", {"vllm_xargs": {"steering_preset": "mild"}}, 400),
        ("/v1/steering/check", {"steering": "kind"}, 200),
        ("/v1/completions", ["steering"], 200),
    ],
)
def test_a_wish_that_would_be_lost_is_refused(path: str, body: Any, status: int) -> None:
    """Catches a field that vLLM ignores, and a middleware that eats the bodies of others."""
    given, inside = heard(path, body)
    assert given == status
    assert inside == (json.dumps(body).encode() if status == 200 else b"")


# --- the environment


@pytest.mark.parametrize(
    ("given", "dose"), [("", 1.0), ("0.3", 0.3), ("none", None), ("any", None)]
)
def test_the_dose_limit_is_read(
    monkeypatch: pytest.MonkeyPatch, given: str, dose: float | None
) -> None:
    """Catches a limit that was set and is not kept."""
    monkeypatch.setenv("TRIMTAB_MAX_DOSE", given)
    assert environment_settings().max_dose == dose


@pytest.mark.parametrize(
    ("name", "value"), [("TRIMTAB_MAX_DOSE", "much"), ("TRIMTAB_ADMIN_KEYS", "short")]
)
def test_a_wrong_variable_is_named_but_not_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Catches a limit that is silently the default, and a key in a log."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelLoadError, match=name) as caught:
        environment_settings()
    assert value not in caught.value.message


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/small-model", "owner/small-model"),
        ("/cache/models--owner--small-model/snapshots/0f3a9c", "owner/small-model"),
    ],
)
def test_a_models_name_is_the_users(model: str, name: str) -> None:
    """Catches a store that is named after a commit and always empty."""
    assert public_name(model) == name

"""The engine's life: loading, ready, failed, stopped; and requests that end before their time."""

from __future__ import annotations

import json
import logging
import socket
import threading

import httpx
import openai
import pytest
from serving_fakes import FakeEngine

from trimtab.steering.errors import ModelLoadError


def test_the_port_opens_before_the_model_is_loaded(serve):
    """A server that refuses connections for minutes looks dead to whoever started it."""
    engine, ready = FakeEngine(), threading.Event()
    engine.may_start.clear()
    served = serve(engine=engine, wait=False, on_ready=ready.set)
    health = served.http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert served.metric("trimtab_ready") == 0
    for answer in (served.chat(), served.http.get("/v1/models")):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "loading"
        assert int(answer.headers["retry-after"]) > 0
    assert not ready.is_set()
    engine.may_start.set()
    served.until(lambda: served.http.get("/health").status_code == 200)
    assert ready.is_set()
    assert served.chat().status_code == 200
    assert served.metric("trimtab_ready") == 1


def test_a_failed_start_is_told(serve):
    """A server that says `loading` for ever."""
    engine = FakeEngine(start_error=ModelLoadError("The file is not there."))
    errors: list[BaseException] = []
    served = serve(engine=engine, wait=False, on_failed=errors.append)
    served.until(lambda: bool(errors))
    health = served.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "failed", "error": "The file is not there."}
    assert served.chat().status_code == 503


def test_an_unexpected_failed_start_hides_its_insides(serve):
    """Paths and tokens of an exception that strangers can read."""
    engine = FakeEngine(start_error=RuntimeError("/secret/path"))
    served = serve(engine=engine, wait=False)
    served.until(lambda: served.http.get("/health").json()["status"] == "failed")
    assert "secret" not in served.http.get("/health").text


def test_a_dead_engine_is_not_healthy(serve):
    """A router that goes on sending to a server whose engine's process is gone."""
    engine = FakeEngine()
    served = serve(engine=engine)
    assert served.chat().status_code == 200
    engine.is_alive = False
    health = served.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    answer = served.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "failed")


def test_the_engine_stops_with_the_app(serve):
    """Threads and memory that outlive the server."""
    engine = FakeEngine()
    served = serve(engine=engine)
    served.server.should_exit = True
    served.until(lambda: engine.is_stopped)


def test_the_app_stops_while_the_model_loads(serve):
    """Ctrl-C during a long load that hangs."""
    engine = FakeEngine()
    engine.may_start.clear()
    served = serve(engine=engine, wait=False)
    served.server.should_exit = True
    served.until(lambda: engine.is_stopped)


def leave_once_running(served, **body) -> None:
    """Post a request and close the connection as soon as the engine has all of it."""
    data = json.dumps({"model": "toy", "prompt": "x", "max_tokens": 200} | body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(head.encode() + data)
        served.until(lambda: len(served.engine.live) == body.get("n", 1))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("delay_s", [0.1, 30.0], ids=["while it answers", "before a token"])
def test_a_client_that_leaves_cancels_its_work(serve, stream, n, delay_s):
    """Abandoned answers that keep generating, streamed or not, begun or still waiting."""
    engine = FakeEngine(delay_s=delay_s)
    served = serve(engine=engine)
    leave_once_running(served, stream=stream, n=n)
    served.until(lambda: not engine.live)
    assert len(engine.cancelled) == n


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeout_is_told_and_cancels(serve, stream):
    """A stuck request that holds its place for ever."""
    engine = FakeEngine(delay_s=0.05)
    served = serve(engine=engine, request_timeout_s=0.25)
    answer = served.complete(max_tokens=200, stream=stream)
    if stream:
        last = answer.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    else:
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "server_error"
    served.until(lambda: not engine.live)
    assert len(engine.cancelled) == 1


def test_an_error_in_mid_stream_is_an_event_without_done(serve, caplog):
    """A torn answer that ends in [DONE] is taken for a whole one."""
    served = serve(engine=FakeEngine(fail_at=3))
    with caplog.at_level(logging.CRITICAL, logger="trimtab"):
        text = served.complete(stream=True).text
        assert "[DONE]" not in text
        assert "secret" not in text
        assert '"error"' in text.strip().split("\n\n")[-1]
        with (
            pytest.raises(openai.APIError),
            served.openai.completions.create(model="toy", prompt="x", stream=True) as stream,
        ):
            list(stream)


def test_an_unexpected_error_is_a_500_without_insides_and_logged(serve, caplog):
    """Tracebacks that strangers read, or that nobody can find."""
    served = serve(engine=FakeEngine(fail_at=0))
    answer = served.complete()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert any("secret insides" in str(r.exc_info[1]) for r in caplog.records if r.exc_info)
    assert served.metric("trimtab_requests_total") > 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_steered_answer_without_receipt_is_an_error(serve, stream):
    """An engine that forgot the steering must not pass for one that did it."""
    served = serve(engine=FakeEngine(forget_receipt=True))
    answer = served.complete(steering="1.0 kind", stream=stream)
    if stream:
        assert "engine_error" in answer.text.strip().split("\n\n")[-1]
    else:
        assert answer.status_code == 500
    assert served.complete(stream=stream).status_code == 200


def test_a_full_queue_is_429_with_retry_after_and_all_or_nothing(serve):
    """Half of n choices admitted, or a refusal without a time to come back."""
    engine = FakeEngine(room=2)
    served = serve(engine=engine)
    answer = served.complete(n=3)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert not engine.seen
    assert served.complete(n=2).status_code == 200


def test_engine_request_ids_are_never_the_clients(serve):
    """A client that names its request after another's could cancel it."""
    engine = FakeEngine()
    served = serve(engine=engine)
    for _ in range(2):
        served.http.post(
            "/v1/completions",
            json={"model": "toy", "prompt": "x"},
            headers={"x-request-id": "mine"},
        )
    assert len({r.id for r in engine.seen}) == 2
    assert all("mine" not in r.id for r in engine.seen)

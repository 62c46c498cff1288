"""The attribution queue: its bounds, its turns with the batch, cancellation, shutdown."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import torch
from running_server import NAME, Served

from trimtab.serving.engines.base import EngineError
from trimtab.serving.engines.transformers.slices import SliceQueue

LONG = {
    "model": NAME,
    "messages": [{"role": "user", "content": "How long is a piece of string? " * 4}],
    "target": "twice half its length",
    "method": "integrated_gradients",
    "params": {"points": 1024},
    "stream": True,
}


def n_jobs(served: Served) -> int:
    return len(served.app.state.server.attributions)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield a stream's events. Keep the iterator: once it is gone httpx closes the connection."""
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


def test_a_full_queue_says_when_to_come_back(serve_toy: Callable[..., Served]) -> None:
    """Catches a queue without bounds, and a place that is never given back."""
    served = serve_toy(attribution_max_queue=1, attribution_max_tokens=10**9)
    with served.http.stream("POST", "/v1/attributions", json=LONG) as running:
        stream = events(running)
        assert next(stream)["status"] == "queued"
        refused = served.http.post("/v1/attributions", json=LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        # Before the answer is generated, not after.
        steps = served.engine.stats().steps
        assert served.chat(attribution={}).status_code == 429
        assert served.engine.stats().steps == steps
        assert served.chat().status_code == 200
    served.until(lambda: n_jobs(served) == 0)
    assert served.chat(attribution={}).status_code == 200
    for _ in range(3):
        assert served.chat(attribution={}, n=2).status_code == 429
    assert served.chat(attribution={}).status_code == 200


def test_leaving_cancels_and_frees(serve_toy: Callable[..., Served]) -> None:
    """Catches work that goes on for nobody, and tensors that outlive it."""
    served = serve_toy(attribution_max_tokens=10**9)
    held: list[weakref.ref[Any]] = []
    jobs = served.app.state.server.attributions
    with served.http.stream("POST", "/v1/attributions", json=LONG) as running:
        stream = events(running)
        while next(stream)["done"] == 0:
            pass
        held += [weakref.ref(job) for job in jobs._live.values()]
        assert len(held) == 1
    served.until(lambda: n_jobs(served) == 0)

    def gone() -> bool:
        gc.collect()
        return all(ref() is None for ref in held)

    served.until(gone)


def test_a_job_can_be_watched_and_cancelled_by_its_id(serve_toy: Callable[..., Served]) -> None:
    """Catches a cancel that is heard only when the job would have ended anyway."""
    served = serve_toy(attribution_max_tokens=10**9)
    with ThreadPoolExecutor(1) as pool:
        body = {k: v for k, v in LONG.items() if k != "stream"}
        answer = pool.submit(served.http.post, "/v1/attributions", json=body)
        served.until(lambda: n_jobs(served) == 1)
        (id,) = served.app.state.server.attributions._live
        path = f"/v1/attributions/{id}"
        served.until(lambda: served.http.get(path).json()["done"] > 0)
        progress = served.http.get(path).json()
        assert 0 < progress["done"] < progress["total"]
        assert progress["eta_s"] > 0
        assert served.metric("trimtab_attributions") == 1
        assert served.http.delete(path).status_code == 200
        cancelled = answer.result(timeout=10)
    assert cancelled.status_code == 499
    assert cancelled.json()["error"]["code"] == "cancelled"
    assert served.http.get(path).status_code == 404


def test_a_waiting_job_leaves_the_queue_at_once(serve_toy: Callable[..., Served]) -> None:
    """Catches a cancelled job that keeps its place until the jobs before it are done."""
    served = serve_toy(attribution_max_tokens=10**9)
    with served.http.stream("POST", "/v1/attributions", json=LONG) as running:
        stream = events(running)
        next(stream)
        with served.http.stream("POST", "/v1/attributions", json=LONG) as waiting:
            other = events(waiting)
            event = next(other)
            assert (event["status"], event["position"]) == ("queued", 1)
        served.until(lambda: n_jobs(served) == 1)
        assert served.http.get(f"/v1/attributions/{event['id']}").status_code == 404


def test_chats_are_the_same_beside_attributions(serve_toy: Callable[..., Served]) -> None:
    """Catches rules or hooks of an attribution that reach a neighbour's forward pass."""
    served = serve_toy(attribution_max_tokens=10**9)
    asked = {"n": 3, "temperature": 0.8, "seed": 5, "max_tokens": 40, "logprobs": True}
    alone = served.chat(**asked).json()["choices"]
    lrp = LONG | {"method": "attnlrp", "params": {}, "stream": False}
    with ThreadPoolExecutor(6) as pool:
        beside = [pool.submit(served.http.post, "/v1/attributions", json=lrp) for _ in range(5)]
        chats = [served.chat(**asked).json()["choices"] for _ in range(3)]
        bodies = [future.result().json() for future in beside]
    assert all(choices == alone for choices in chats)
    assert len({json.dumps(body["input"]) for body in bodies}) == 1


def test_stopping_the_server_ends_a_running_job(serve_toy: Callable[..., Served]) -> None:
    """Catches a shutdown that waits for an attribution, or a thread left behind."""
    served = serve_toy(attribution_max_tokens=10**9)
    with served.http.stream("POST", "/v1/attributions", json=LONG) as running:
        stream = events(running)
        next(stream)
        served.server.should_exit = True
        with suppress(httpx.HTTPError, json.JSONDecodeError):
            *_, last = stream
            assert last["object"] != "attribution"
    names = ("trimtab-engine", "trimtab-attribution")
    served.until(
        lambda: not [t for t in threading.enumerate() if t.name.startswith(names)], within_s=20
    )


def test_slices_take_turns_with_the_batch() -> None:
    """Catches attributions that starve the batch, or never run beside it."""
    queue = SliceQueue(share=0.5)
    futures = [queue.submit(lambda: time.sleep(0.02)) for _ in range(3)]
    queue.run_next(is_busy=True)
    assert [f.done() for f in futures] == [True, False, False]
    queue.run_next(is_busy=True)
    assert not futures[1].done()
    queue.stepped(0.001)
    queue.run_next(is_busy=True)
    assert not futures[1].done()
    queue.stepped(1.0)
    queue.run_next(is_busy=True)
    assert futures[1].done()
    queue.run_next(is_busy=False)
    assert futures[2].done()


def test_a_slice_that_fails_fails_alone() -> None:
    """Catches an exception that ends the model's thread."""
    queue = SliceQueue()

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    bad, good = queue.submit(fail), queue.submit(lambda: 7)
    queue.run_next(is_busy=False)
    queue.run_next(is_busy=False)
    assert isinstance(bad.exception(), torch.OutOfMemoryError)
    assert good.result() == 7
    late = queue.submit(lambda: 8)
    queue.close()
    assert isinstance(late.exception(), EngineError)
    with pytest.raises(EngineError):
        queue.submit(lambda: 9)

"""A server on loopback for each engine.

`served` is the fixture that endpoint tests use: it runs over every engine there is. Tests of the
protocol alone use `fake_served`, or `serve` for a server with other settings.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from serving_fakes import FakeEngine, model_ref, toy_vector
from toy_chat import toy_chat

from trimtab.serving.app import create_app
from trimtab.serving.engines.base import Engine
from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.artifact import ModelRef
from trimtab.steering.store import Store

NAME = "toy"


@dataclass
class Served:
    """A running server: its parts, its address and two clients."""

    engine: Any
    store: Store
    url: str
    app: Any
    server: uvicorn.Server
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def http(self) -> httpx.Client:
        return self._http

    def __post_init__(self) -> None:
        self._http = httpx.Client(base_url=self.url, headers=self.headers, timeout=60)
        key = self.headers.get("authorization", "Bearer none").removeprefix("Bearer ")
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        return self.http.post("/v1/chat/completions", json=body | {"temperature": 0} | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": NAME, "prompt": "Once", "max_tokens": 8, "temperature": 0}
        return self.http.post("/v1/completions", json=body | fields)

    def metric(self, name: str) -> float:
        """Sum of a metric's samples at /metrics."""
        lines = self.http.get("/metrics").text.splitlines()
        ours = [x for x in lines if x.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(x.rpartition(" ")[2]) for x in ours)

    def until(self, condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
        """Wait for something the server does by itself; fail if it never does."""
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "the server never got there"
            time.sleep(0.005)


@contextlib.contextmanager
def running(
    engine: Engine, store: Store, *, settings: ServerSettings, wait: bool = True, **more: Any
) -> Iterator[Served]:
    headers = more.pop("headers", {})
    app = create_app(engine, store, settings=settings, **more)
    config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    # With its protocol named, or asyncio leaves Nagle's algorithm on: 40 ms a request.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    served = Served(engine, store, f"http://127.0.0.1:{port}", app, server, headers)
    try:
        served.until(lambda: server.started)
        if wait:
            served.until(lambda: served.http.get("/health").status_code == 200, within_s=120)
        yield served
    finally:
        served.http.close()
        served.openai.close()
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server over a fake engine: `serve(engine=..., api_keys=...)`."""
    with contextlib.ExitStack() as stack:

        def start(
            *,
            engine: Any = None,
            wait: bool = True,
            headers: dict[str, str] | None = None,
            on_ready: Any = None,
            on_failed: Any = None,
            **settings: Any,
        ) -> Served:
            store = Store(tmp_path / "store")
            filled(store, model_ref())
            chosen = ServerSettings(**{"served_model_name": NAME} | settings)
            return stack.enter_context(
                running(
                    engine or FakeEngine(),
                    store,
                    settings=chosen,
                    wait=wait,
                    headers=headers or {},
                    on_ready=on_ready,
                    on_failed=on_failed,
                )
            )

        yield start


def filled(store: Store, ref: ModelRef, *, size: float = 0.5) -> None:
    """Store what the tests ask for: two vectors of some length, and one that is too strong."""
    store.put_vector(toy_vector("kind", ref=ref, size=size, seed=1))
    store.put_vector(toy_vector("formal", ref=ref, size=size / 2, seed=2))
    store.put_vector(toy_vector("huge", ref=ref, size=100 * size, seed=3))


@pytest.fixture(scope="module")
def fake_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server over the fake engine for all tests of a module."""
    store = Store(tmp_path_factory.mktemp("store"))
    filled(store, model_ref())
    settings = ServerSettings(served_model_name=NAME)
    with running(FakeEngine(), store, settings=settings) as one:
        yield one


@pytest.fixture(scope="module")
def transformers_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server over the embedded engine with a toy model."""
    loaded = toy_chat()
    engine = TransformersEngine(lambda: loaded)
    store = Store(tmp_path_factory.mktemp("store"))
    with running(engine, store, settings=ServerSettings(served_model_name=NAME)) as one:
        norms = engine.info.hidden_norms
        filled(store, engine.info.model, size=0.5 * float(norms.min()))
        yield one


@pytest.fixture(scope="module", params=["fake", "transformers"])
def served(request: pytest.FixtureRequest) -> Served:
    """The server of each engine in turn."""
    one: Served = request.getfixturevalue(f"{request.param}_served")
    return one

"""Servers on loopback in threads of their own, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import uvicorn

from trimtab.serving.app import create_app
from trimtab.serving.engines.base import Engine
from trimtab.serving.settings import ServerSettings
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
def listening(app: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve an app, and give its address. Who connects before it has started waits."""
    config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    # With its protocol named, or asyncio leaves Nagle's algorithm on: 40 ms a request.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running(
    engine: Engine, store: Store, *, settings: ServerSettings, wait: bool = True, **more: Any
) -> Iterator[Served]:
    headers = more.pop("headers", {})
    app = create_app(engine, store, settings=settings, **more)
    with listening(app) as (url, server):
        served = Served(engine, store, url, app, server, headers)
        try:
            served.until(lambda: server.started)
            if wait:
                served.until(lambda: served.http.get("/health").status_code == 200, within_s=120)
            yield served
        finally:
            served.http.close()
            served.openai.close()

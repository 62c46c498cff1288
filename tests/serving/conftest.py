"""A server on loopback for each engine.

`served` is the fixture that endpoint tests use: it runs over every engine there is. Tests of the
protocol alone use `fake_served`, or `serve` for a server with other settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import NAME, Served, running
from serving_fakes import FakeEngine, model_ref, toy_vector
from toy_chat import saved_toy, toy_chat
from toy_classifier import toy_classifier

from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.artifact import ModelRef
from trimtab.steering.store import Store


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
    """Store what the tests ask for: two vectors, one that is too strong, and a classifier."""
    store.put_classifier(toy_classifier(ref))
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


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server over the vLLM engine with a toy model, for the whole session: it starts slowly."""
    from trimtab.serving.engines.vllm.engine import VllmConfig, VllmEngine

    folder = saved_toy(tmp_path_factory.mktemp("vllm") / "toy")
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 32, "block_size": 32}
    engine = VllmEngine(str(folder), config=VllmConfig(options=options))
    store = Store(tmp_path_factory.mktemp("store"))
    with running(engine, store, settings=ServerSettings(served_model_name=NAME)) as one:
        yield one


@pytest.fixture(scope="module")
def vllm_served(vllm_server: Served) -> Served:
    """The vLLM server with the store as a new one would have it."""
    store, info = vllm_server.store, vllm_server.engine.info
    for vector in store.vectors():
        store.delete_vector(vector.id)
    for classifier in store.classifiers():
        store.delete_classifier(classifier.id)
    for name in store.presets():
        store.delete_preset(name)
    filled(store, info.model, size=0.5 * float(info.hidden_norms.min()))
    return vllm_server


ENGINES = ["fake", "transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])]


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest) -> Served:
    """The server of each engine in turn."""
    one: Served = request.getfixturevalue(f"{request.param}_served")
    return one


@pytest.fixture
def serve_toy(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server over the embedded engine with a toy model: `serve_toy(max_n=2)`."""
    with contextlib.ExitStack() as stack:

        def start(*, loaded: Any = None, **settings: Any) -> Served:
            model = loaded or toy_chat()
            engine = TransformersEngine(lambda: model)
            store = Store(tmp_path / "store")
            chosen = ServerSettings(**{"served_model_name": NAME} | settings)
            return stack.enter_context(running(engine, store, settings=chosen))

        yield start

"""The plugin fits a vLLM whole or not at all, and says so when it starts."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from trimtab.serving.engines.vllm import plain_vllm, plugin
from trimtab.steering.errors import ModelLoadError


class Owner:
    """Has every method that is wrapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.connector = kwargs.get("connector")

    def load_model(self) -> None: ...
    def __post_init__(self) -> None: ...
    def update_from_output(self, scheduled: Any, output: Any) -> dict[int, Any]:
        return {}

    def finish_requests(self) -> None: ...
    def process_outputs(self, outputs: Any) -> None: ...
    def add_request(self) -> None: ...
    def abort_requests(self) -> None: ...


HOMES = {
    "vllm.config": "VllmConfig",
    "vllm.v1.core.sched.scheduler": "Scheduler",
    "vllm.v1.engine.output_processor": "OutputProcessor",
    "vllm.v1.request": "Request",
    "vllm.v1.worker.gpu_worker": "Worker",
    "vllm.v1.engine.async_llm": "AsyncLLM",
    "vllm.v1.engine.llm_engine": "LLMEngine",
}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A vLLM of empty classes, fresh for each test; class name -> class."""
    classes: dict[str, Any] = {}
    for home, name in HOMES.items():
        own = {k: v for k, v in vars(Owner).items() if k not in ("__dict__", "__weakref__")}
        classes[name] = type(name, (), own)  # no base, so that a name deleted is gone
        classes[name].generate = lambda self: None
        pieces = home.split(".")
        for depth in range(1, len(pieces) + 1):
            whole = ".".join(pieces[:depth])
            if not isinstance(sys.modules.get(whole), Empty):
                monkeypatch.setitem(sys.modules, whole, Empty(whole))
        setattr(sys.modules[home], name, classes[name])
    core = sys.modules["vllm.v1.core"]
    for name in ("block_pool", "kv_cache_utils"):
        made = Empty(f"vllm.v1.core.{name}")
        made.generate_block_hash_extra_keys = lambda *a: (None, 0)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        setattr(core, name, made)
    sys.modules["vllm"].__version__ = "0.99"
    monkeypatch.setattr(plugin, "_is_registered", False)
    monkeypatch.setattr(plugin, "_shares_outside", False)
    monkeypatch.setattr(plugin, "_tell_of_quantization", lambda: told.append("trimtab"))
    told.clear()
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    return classes


told: list[str] = []  # of quantisation methods


class Empty(ModuleType):
    """A module made for a test."""

    __path__: ClassVar[list[str]] = []


def test_a_vllm_that_lacks_a_hook_is_refused_untouched(vllm: dict[str, Any]) -> None:
    """Half a plugin: requests that are taken as steered by a server whose workers are not."""
    del vllm["Scheduler"].update_from_output
    before = vllm["Worker"].load_model
    with pytest.raises(ModelLoadError, match=r"0\.99.*update_from_output"):
        plugin.register()
    assert vllm["Worker"].load_model is before


def test_one_that_moved_a_class_is_refused(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import error that vLLM would log and forget."""
    monkeypatch.delattr(sys.modules["vllm.v1.request"], "Request")
    with pytest.raises(ModelLoadError, match=r"0\.99"):
        plugin.register()


def test_registering_twice_wraps_once(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM calls its plugins several times a process; salt on salt is another salt."""
    monkeypatch.setattr(
        "trimtab.serving.engines.vllm.plain_vllm.guard_requests", lambda is_on: None
    )
    plugin.register()
    first = vllm["Scheduler"].update_from_output
    plugin.register()
    assert vllm["Scheduler"].update_from_output is first
    assert told == ["trimtab"]
    assert vllm["Scheduler"]().update_from_output(None, SimpleNamespace()) == {}


def test_switched_off_nothing_is_wrapped(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill switch that leaves half of it on."""
    guarded: list[bool] = []
    monkeypatch.setenv(plugin.SWITCH, "off")
    monkeypatch.setattr(plain_vllm, "guard_requests", lambda is_on: guarded.append(is_on))
    before = {name: dict(vars(owner)) for name, owner in vllm.items()}
    plugin.register()
    assert {name: dict(vars(owner)) for name, owner in vllm.items()} == before
    assert guarded == [False]
    assert told == ["trimtab"]  # a folder of ours is nothing that vLLM's own methods run as it is


def test_switched_off_an_unknown_vllm_still_runs(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A version that trimtab does not fit, with no way left to serve without it."""

    def lacks() -> None:
        raise ImportError("no CompressedTensorsConfig")

    monkeypatch.setenv(plugin.SWITCH, "off")
    monkeypatch.setattr(plain_vllm, "guard_requests", lambda is_on: None)
    monkeypatch.setattr(plugin, "_tell_of_quantization", lacks)
    plugin.register()
    assert "no CompressedTensorsConfig" in caplog.text


@pytest.mark.parametrize("connector", [None, object()])
def test_a_store_outside_gets_salts_of_its_own(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, connector: Any
) -> None:
    """A connector that knows no extra keys hands a steered answer's blocks to a plain prompt."""
    monkeypatch.setattr(
        "trimtab.serving.engines.vllm.plain_vllm.guard_requests", lambda is_on: None
    )
    plugin.register()
    vllm["Scheduler"](connector=connector)
    rule = {"salt": None, "answer": "abc", "alone": False}
    seen: dict[str, Any] = {}

    def keep(request: Any, **kwargs: Any) -> None:
        seen.update(kwargs)

    params = SimpleNamespace(extra_args={"trimtab": {"cache": rule}})
    plugin._with_salt(keep, None, request_id="r", sampling_params=params, cache_salt=None)
    assert (seen["cache_salt"] is None) == (connector is None)

"""What the soak keeps and looks at: answers to compare, memory, and who still holds anything."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
from soak_clients import Client
from soak_reference import Finished

from trimtab.serving.engines.base import Delta, FinishReason, Request
from trimtab.serving.engines.vllm.engine import VllmEngine

KEPT = 400  # answers kept for the comparison, evenly over the run


class Recorder:
    """The engine, with a memory for what greedy requests asked and got."""

    def __init__(self, engine: VllmEngine, *, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.kept: list[Finished] = []
        self.n_finished = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._engine.start()

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        streams = self._engine.generate(*requests)
        return [self._watched(*pair) for pair in zip(requests, streams, strict=True)]

    async def _watched(self, request: Request, stream: Any) -> AsyncIterator[Delta]:
        ids: list[int] = []
        try:
            async for delta in stream:
                ids += delta.token_ids
                if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self._keep(request, ids)
                yield delta
        finally:
            await stream.aclose()

    def _keep(self, request: Request, ids: list[int]) -> None:
        if request.sampling.temperature != 0.0:
            return
        self.n_finished += 1
        made = Finished(request.prompt_ids, tuple(ids), request.plan)
        if len(self.kept) < KEPT:
            self.kept.append(made)
        elif (place := self._random.randrange(self.n_finished)) < KEPT:
            self.kept[place] = made

    def ask(self, method: str) -> list[dict[str, int]]:
        """Call a method of the worker."""
        assert self.loop is not None
        asked = self._engine._llm.collective_rpc(method)
        return asyncio.run_coroutine_threadsafe(asked, self.loop).result(timeout=30)


class Memory:
    """Resident memory of this process and its children, now and then."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.samples: list[tuple[float, float, float]] = []  # minutes, MiB here, MiB in children

    def sample(self) -> None:
        me = psutil.Process()
        children = sum(child.memory_info().rss for child in me.children(recursive=True))
        minutes = (time.monotonic() - self._begun) / 60
        self.samples.append((minutes, me.memory_info().rss / 2**20, children / 2**20))

    def growth(self) -> dict[str, dict[str, float | bool]]:
        """Return each side's slope and rise after a third of the run, and whether that is flat."""
        late = [one for one in self.samples if one[0] >= self.samples[-1][0] / 3]
        minutes = late[-1][0] - late[0][0]
        bound = 32 + 2 * minutes
        found: dict[str, dict[str, float | bool]] = {}
        for column, name in ((1, "server"), (2, "engine")):
            slope, _ = statistics.linear_regression(
                [one[0] for one in late], [one[column] for one in late]
            )
            rise = slope * minutes
            found[name] = {
                "last_mib": round(late[-1][column], 1),
                "slope_mib_a_minute": round(slope, 2),
                "rise_mib": round(rise, 1),
                "bound_mib": round(bound, 1),
                "is_flat": rise <= bound,
            }
        return found


def preemptions() -> float:
    """Return how often vLLM says that it preempted."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "vllm:num_preemptions"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def drained(recorder: Recorder, client: Client) -> dict[str, Any]:
    """Wait until nobody holds anything, and return what is held."""
    held: dict[str, Any] = {}
    for _ in range(60):
        client.http.post("/v1/chat/completions", json=client.body() | {"max_tokens": 1, "n": 1})
        worker = recorder.ask("trimtab_stats")[0]
        app = recorder.stats()
        held = {
            "worker_requests": worker["requests"],
            "worker_slots": worker["slots_used"],
            "app_running": app.running,
            "app_waiting": app.waiting,
            "app_slots": app.slots_used,
        }
        if not any(held.values()):
            break
        time.sleep(0.5)
    return held | {"worker": worker}

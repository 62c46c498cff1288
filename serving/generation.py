"""One answer in the making: its sequences run together, are timed, and end together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request as HttpRequest

from trimtab.serving.body import GoneError
from trimtab.serving.engines.base import Delta, EngineError, FinishReason, Request
from trimtab.serving.errors import RequestError
from trimtab.serving.generation_log import Watch
from trimtab.serving.state import ServerState


class Generation:
    """Runs the sequences of one answer and merges their deltas in the order they come.

    All sequences are queued together, or none. Whoever makes one must `close` it: that cancels
    what still runs.

    Args:
        server: the app's parts.
        requests: the sequences, one a choice.
        watch: shown every delta before it goes on; None if nobody looks.

    Raises:
        TrimtabError: the engine refuses the requests.
    """

    def __init__(
        self, server: ServerState, requests: Sequence[Request], *, watch: Watch | None = None
    ) -> None:
        self._watch = watch
        self._metrics = server.metrics
        self._timeout_s = server.settings.request_timeout_s
        self._began = time.perf_counter()
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        for request in requests:
            server.engine.check(request)
        self._steered = [request.plan is not None for request in requests]
        self._probes = [request.probes for request in requests]
        self._must_steer = [bool(r.plan is not None and r.plan.parts) for r in requests]
        self._iterators = server.engine.generate(*requests)
        self._tasks = [asyncio.create_task(self._pump(i)) for i in range(len(requests))]
        self._live = set(range(len(requests)))
        self._last_token = [self._began] * len(requests)
        self._has_token = False

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index of the sequence, delta) until all have finished.

        Raises:
            EngineError: the engine failed on a sequence, or lost one.
            RequestError: 504, the time is up.
        """
        while self._live:
            left_s = self._began + self._timeout_s - time.perf_counter()
            try:
                index, delta = await asyncio.wait_for(self._queue.get(), max(left_s, 0))
            except TimeoutError:
                raise RequestError(
                    f"The answer took longer than {self._timeout_s:g} s and was cancelled; ask "
                    "for fewer tokens, or start the server with a longer --request-timeout-s.",
                    status=504,
                    code="timeout",
                ) from None
            if isinstance(delta, Exception):
                raise delta
            self._observe(index, delta)
            if delta.finish_reason is not None:
                self._live.discard(index)
            checked = self._checked(index, delta)
            if self._watch is not None:
                self._watch(index, checked)
            yield index, checked

    async def _pump(self, index: int) -> None:
        try:
            async for delta in self._iterators[index]:
                self._queue.put_nowait((index, delta))
                if delta.finish_reason is not None:
                    return
        except Exception as error:
            self._queue.put_nowait((index, error))
            return
        lost = EngineError("The engine ended a sequence without saying why.")
        self._queue.put_nowait((index, lost))

    def _checked(self, index: int, delta: Delta) -> Delta:
        if delta.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            raise EngineError("The engine gave up on this request; try again.")
        # A steered answer without its receipt may be an unsteered one: never pass it on.
        if delta.finish_reason and self._must_steer[index] and delta.steering is None:
            raise EngineError("The engine gave no account of the steering it was asked for.")
        if self._probes[index] and len(delta.probes) != len(delta.token_ids):
            raise EngineError("The engine gave no account of the probes it was asked for.")
        return delta

    def _observe(self, index: int, delta: Delta) -> None:
        count = len(delta.token_ids)
        if count:
            now = time.perf_counter()
            if not self._has_token:
                self._has_token = True
                self._metrics.first_token.observe(now - self._began)
            elif self._last_token[index] != self._began:
                for _ in range(count):
                    self._metrics.inter_token.observe((now - self._last_token[index]) / count)
            self._last_token[index] = now
            self._metrics.completion_tokens.inc(count)
        if delta.probes:
            self._metrics.probed(self._probes[index], delta.probes)
        if delta.steering is not None:
            self._metrics.steered_tokens.inc(delta.steering.get("steered_tokens", 0))

    async def close(self) -> None:
        """Cancel what still runs. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for iterator in self._iterators:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()


async def or_gone(request: HttpRequest, work: Any) -> Any:
    """Await `work`, or cancel it as soon as the client is gone.

    The request's body must have been read.

    Raises:
        GoneError: the client closed the connection first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

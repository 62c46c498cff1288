"""One request's deltas on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from trimtab.serving.engines.base import Delta


class DeltaStream:
    """An async iterator that an engine fills. Leaving it before its end cancels the request.

    Args:
        cancel: ends the request; called at most once, on the event loop.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._is_over = False

    def put(self, item: Delta | Exception) -> None:
        """Add a delta, or the error that ended the request."""
        self._queue.put_nowait(item)

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(item, Exception):
            self._is_over = True
            raise item
        if item.finish_reason is not None:
            self._is_over = True
        return item

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._is_over:
            self._is_over = True
            self._cancel()

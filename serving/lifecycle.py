"""The engine's life beside the app: loading in the background, ready, failed, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from trimtab.serving.engines.base import Engine, EngineInfo
from trimtab.serving.errors import RequestError
from trimtab.steering.errors import TrimtabError

log = logging.getLogger("trimtab.serving")

DEAD = "The engine has died; the server must be started anew, and its log says why."


class NotReadyError(RequestError):
    """The model is not loaded, yet or any more."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, status=503, code=code)
        self.retry_after_s = 5


class Lifecycle:
    """Starts and stops one engine, and says how far it is.

    Args:
        engine: started once.
        on_ready: called when the engine is ready, such as to print the address.
        on_failed: called with the error if it cannot start, such as to end the process.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_ready: Callable[[], None] | None = None,
        on_failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.is_ready = False
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """Facts about the served model.

        Raises:
            NotReadyError: 503 while loading, after a failed start and after the stop.
        """
        if not self.is_ready:
            if self.error is not None:
                raise NotReadyError(f"The model could not be loaded: {self.why}", code="failed")
            raise NotReadyError("The model is still loading; try again soon.", code="loading")
        if not self.engine.is_alive:
            raise NotReadyError(DEAD, code="failed")
        return self.engine.info

    @property
    def why(self) -> str:
        """Why the start failed, in words fit for a client."""
        if isinstance(self.error, TrimtabError):
            return self.error.message
        return f"{type(self.error).__name__}; see the server's log."

    async def begin(self) -> None:
        """Start loading and return at once, so that the port opens and /health can answer."""
        self._task = asyncio.create_task(self._start(), name="trimtab-engine-start")

    async def _start(self) -> None:
        try:
            await self.engine.start()
        except Exception as error:
            self.error = error
            log.error("the engine could not start: %s", error, exc_info=error)
            if self._on_failed is not None:
                self._on_failed(error)
            return
        self.is_ready = True
        if self._on_ready is not None:
            self._on_ready()

    async def end(self) -> None:
        """Stop loading or serving and free the model."""
        self.is_ready = False
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.engine.stop()

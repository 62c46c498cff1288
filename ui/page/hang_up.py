"""Ends the requests that a browser keeps open for as long as it shows the page."""

from __future__ import annotations

import asyncio

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HangUp:
    """ASGI middleware whose open requests can all be ended, with their responses complete.

    uvicorn would wait for them, then cancel them and print a traceback for each.

    Args:
        app: whose requests can be ended.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._requests: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._loop = asyncio.get_running_loop()
        response = _Response(send)
        request = asyncio.ensure_future(self.app(scope, receive, response.send))
        self._requests.add(request)
        try:
            await request
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_over or (task is not None and task.cancelling()):
                raise
            await response.end(scope, receive)
        finally:
            self._requests.discard(request)

    def hang_up(self) -> None:
        """End every open request.

        May be called from a signal handler or another thread.
        """
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._is_over = True
        for request in self._requests:
            request.cancel()


class _Response:
    """Knows how much of a response has been sent, so that it can be ended anywhere."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_started = False
        self._can_end = True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_started = True
            # A body shorter than was announced is an error of its own.
            self._can_end = all(name.lower() != b"content-length" for name, _ in message["headers"])
        elif not message.get("more_body", False):
            self._can_end = False
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        if not self._is_started:
            stopping = PlainTextResponse("The server is stopping.\n", status_code=503)
            await stopping(scope, receive, self._send)
        elif self._can_end:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

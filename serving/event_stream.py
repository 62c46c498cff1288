"""Server-sent events: an answer's chunks as they come, and an end to the work if nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from trimtab.serving.errors import error_of


class EventStream(Response):
    """Sends chunks as `data:` events, then `data: [DONE]`.

    An error on the way becomes an `error` event, without [DONE], so that no client takes a torn
    answer for a whole one. When the client goes away, the work is closed at once.

    Args:
        chunks: OpenAI's chunk objects.
        close: ends the work behind the chunks; always awaited.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[BaseModel], *, close: Callable[[], Awaitable[None]]
    ) -> None:
        # Proxies that buffer would turn a stream into one late lump.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            await self._close()

    async def _send(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        last = b"data: [DONE]\n\n"
        try:
            async for chunk in self._chunks:
                await _send_part(send, as_json(chunk))
        except Exception as error:
            _, body, _ = error_of(error)
            last = b"data: " + bytes(JSONResponse(body).body) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})


def as_json(answer: BaseModel) -> bytes:
    """Return an OpenAI object as it goes over the wire: only the fields that were set."""
    # Warnings off, because OpenAI's own types deny nulls that its API sends (logprobs of the
    # first token of an echo).
    return answer.model_dump_json(exclude_unset=True, warnings=False).encode()


async def _send_part(send: Send, data: bytes) -> None:
    body = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

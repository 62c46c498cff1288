"""The page's way to the server: its HTTP API, for many visitors at once."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from trimtab.ui.client import ServerError, is_local, refusal, server_root

# A server that loads a model, or lets a request wait in its queue, may be silent for long.
_READ_S = 600.0
_CONNECT_S = 5.0
_ADMIN_ONLY = 403
# What the page passes on between browser and server in one piece.
MAX_FILE_BYTES = 32 * 2**20
ANOTHER_KEY = "Another key"
"""The button by which somebody gives another key."""


class RefusedError(ServerError):
    """What the server refused, in its own words.

    Attributes:
        http_status: its HTTP status.
    """

    def __init__(self, message: str, *, http_status: int) -> None:
        super().__init__(message)
        self.http_status = http_status


class Api:
    """Talks to one trimtab server. All methods raise ServerError with a sentence for people.

    Args:
        url: its root, with or without `/v1`.
        key: bearer key, if the server asks for one.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self.url = server_root(url)
        self.key = key
        self._client: httpx.AsyncClient | None = None

    def with_key(self, key: str | None) -> Api:
        """Return the same connections under another key; None keeps this one's."""
        if key is None or key == self.key:
            return self
        other = Api(self.url, key=key)
        other._client = self._connections()
        return other

    async def get(self, path: str, **query: Any) -> Any:
        """Return the JSON of a GET."""
        return _json(await self._answer("GET", path, params=query), self.url)

    async def get_bytes(self, path: str, **query: Any) -> bytes:
        """Return the body of a GET, at most `MAX_FILE_BYTES` of it.

        Raises:
            ServerError: it is longer.
        """
        data = bytearray()
        async with self._sent("GET", path, params=query) as answer:
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > MAX_FILE_BYTES:
                    raise ServerError(
                        f"This file is longer than the {MAX_FILE_BYTES // 2**20} MiB that the page "
                        f"passes on. Fetch it with: curl -OJ '{answer.url}'"
                    )
        return bytes(data)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST."""
        return _json(await self._answer("POST", path, json=body), self.url)

    async def put(self, path: str, body: Any) -> Any:
        """Return the JSON of a PUT."""
        return _json(await self._answer("PUT", path, json=body), self.url)

    async def put_bytes(self, path: str, data: bytes) -> Any:
        """Return the JSON of a PUT whose body is a file."""
        return _json(await self._answer("PUT", path, content=data), self.url)

    async def delete(self, path: str) -> Any:
        """Return the JSON of a DELETE."""
        return _json(await self._answer("DELETE", path), self.url)

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the events of a streamed POST. Closing the iterator cancels the request.

        Raises:
            ServerError: refused, failed on the way, or cut off before its end.
        """
        async with self._sent("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                if not line.startswith("data:"):
                    continue
                event = _json(data.encode(), self.url)
                if "error" in event and "choices" not in event:
                    raise ServerError(str(event["error"]["message"]))
                yield event
        raise ServerError("The server ended the answer before its end. Try again.")

    async def close(self) -> None:
        """Close the connections. Safe to call twice."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _answer(self, method: str, path: str, **more: Any) -> bytes:
        async with self._sent(method, path, **more) as answer:
            return await answer.aread()

    @asynccontextmanager
    async def _sent(self, method: str, path: str, **more: Any) -> AsyncIterator[httpx.Response]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with self._connections().stream(method, path, headers=headers, **more) as answer:
                if answer.is_error:
                    sentence = refusal(
                        await answer.aread(), status=answer.status_code, url=self.url
                    )
                    if answer.status_code == _ADMIN_ONLY:
                        sentence += f" Here, give it under “{ANOTHER_KEY}” at the top."
                    raise RefusedError(sentence, http_status=answer.status_code)
                yield answer
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServerError(
                f"The server at {self.url} cannot be reached: {reason}. Start it with "
                "`trimtab serve`, or wait until it is back, and try again."
            ) from None

    def _connections(self) -> httpx.AsyncClient:
        # Made by the first request, because it belongs to the event loop that runs then.
        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self.url,
                timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
                trust_env=not is_local(self.url),
            )
        return self._client


def _json(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ServerError(f"{url} did not answer in JSON; is it a trimtab server?") from None

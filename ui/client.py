"""A small client of the server's own API, from the standard library: it starts in no time."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.steering.errors import TrimtabError


class ServerError(TrimtabError):
    """A server that cannot be reached, or what it refused, in its own words."""

    code = "server_error"


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer.

    Attributes:
        text: new text.
        receipt: on the last piece of a steered answer.
        finish_reason: on the last piece.
    """

    text: str = ""
    receipt: dict[str, Any] | None = None
    finish_reason: str | None = None


class Client:
    """Talks to one trimtab server.

    Args:
        url: its root, with or without `/v1`.
        key: bearer key, if the server asks for one.
        timeout_s: longest wait for a single read.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = server_root(url)
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        handlers = [urllib.request.ProxyHandler({})] if is_local(self.url) else []
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> Any:
        """Return the JSON of a GET.

        Raises:
            ServerError: unreachable, or refused with the server's own message.
        """
        with self._open(path, None) as answer:
            return _json(answer.read(), url=self.url)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST.

        Raises:
            ServerError: unreachable, or refused with the server's own message.
        """
        with self._open(path, body) as answer:
            return _json(answer.read(), url=self.url)

    def served_model(self) -> str:
        """Return the name of the served model."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        *,
        model: str,
        steering: Any = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[Piece]:
        """Stream the answer to a conversation. Leaving the iterator cancels the request.

        Raises:
            ServerError: refused, failed on the way, cut off before its end, or not steered as
                asked (a server that ignores the field is not ours).
        """
        is_steered = steering is None
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        if steering is not None:
            body["steering"] = steering
        if seed is not None:
            body["seed"] = seed
        with self._open("/v1/chat/completions", body) as answer:
            try:
                for line in answer:
                    event = line.decode().strip().removeprefix("data: ")
                    if event == "[DONE]":
                        if not is_steered:
                            raise ServerError(f"{self.url} ignored `steering`; is it trimtab?")
                        return
                    if event:
                        piece = _piece(_json(event.encode(), url=self.url))
                        is_steered = is_steered or piece.receipt is not None
                        yield piece
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"The server {self.url} broke off: {error}.") from None
        raise ServerError(f"The server {self.url} ended the answer before its end.")

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            return self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error, url=self.url) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"No server answers at {self.url}: {reason}. Start one with `trimtab serve`, or "
                "correct --url."
            ) from None


def server_root(url: str) -> str:
    """Return a server's root from an address with or without scheme and `/v1`.

    Raises:
        ServerError: it is no address of an HTTP server.
    """
    root = url.rstrip("/").removesuffix("/v1")
    root = root if "://" in root else f"http://{root}"
    if not root.startswith(("http://", "https://")):
        raise ServerError(
            f"{url!r} is no address of a server. Give one such as http://127.0.0.1:8000."
        )
    return root


def is_local(root: str) -> bool:
    """Return whether a server is on this machine: a proxy, for the world outside, is not for it."""
    return root.partition("://")[2].startswith(("127.", "localhost", "[::1]"))


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise ServerError(str(event["error"]["message"]))
    choices = event.get("choices") or [{}]
    return Piece(
        text=choices[0].get("delta", {}).get("content") or "",
        receipt=event.get("steering"),
        finish_reason=choices[0].get("finish_reason"),
    )


def _refused(error: urllib.error.HTTPError, *, url: str) -> ServerError:
    message = refusal(error.read(), status=error.code, url=url)
    if error.code == 401:
        message += " Give it with --api-key or TRIMTAB_API_KEY."
    return ServerError(message)


def refusal(body: bytes, *, status: int, url: str) -> str:
    """Return the sentence of a refused request: the server's own, or what it may be instead.

    Args:
        body: of the answer.
        status: its HTTP status.
        url: the server's root.
    """
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answered with status {status}; is it a trimtab server?"


def _json(data: bytes, *, url: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ServerError(f"{url} did not answer in JSON; is it a trimtab server?") from None

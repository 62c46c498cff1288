"""Reading a request's body: bounded, strict UTF-8, strict JSON, nothing silently dropped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from trimtab.serving.errors import RequestError
from trimtab.steering.spec import json_path

# Parsing 64 KiB takes under a millisecond; what is longer must not hold up the event loop.
_INLINE_BYTES = 64 * 1024


class GoneError(RequestError):
    """The client went away; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("The client closed the connection.", status=499, code="client_closed")


async def read_body(request: Request, *, limit: int) -> bytes:
    """Return the body, reading no more than the limit.

    Raises:
        RequestError: 413 if it is longer, by its Content-Length or as it arrives.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
    except ClientDisconnect:
        raise GoneError from None
    return b"".join(chunks)


async def read_json(request: Request, *, limit: int) -> Any:
    """Return the body as strict JSON.

    Raises:
        RequestError: 413 too long, 415 not declared as JSON, 400 not strict JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        # A web page may send text/plain to any local address without asking; JSON it may not.
        raise RequestError(
            f"The body's content type is {kind[:80] or 'missing'!r}; "
            "send the header 'Content-Type: application/json'.",
            status=415,
            code="unsupported_media_type",
        )
    data = await read_body(request, limit=limit)
    if len(data) <= _INLINE_BYTES:
        return parse_json(data)
    return await run_in_threadpool(parse_json, data)


async def read_object(request: Request, *, limit: int) -> dict[str, Any]:
    """Return the body as a JSON object.

    Raises:
        RequestError: as `read_json`, or the JSON is not an object.
    """
    value = await read_json(request, limit=limit)
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, not {_kind(value)}.")
    return value


def parse_json(data: bytes | str, *, root: str = "") -> Any:
    """Parse JSON and refuse what Python's parser lets through.

    Args:
        data: the text; bytes must be UTF-8.
        root: JSON path of the whole text, put before paths in errors.

    Raises:
        RequestError: not UTF-8, not JSON, nested too deep, a doubled key, a number that is not
            finite (`NaN`, `Infinity`, `1e400`) or half of a surrogate pair, with its JSON path.
    """
    param = root or None
    odd: list[bool] = []

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            odd.append(True)
        return value

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=_once)
        if odd or "\\ud" in text or "\\uD" in text or isinstance(data, str):
            _refuse_odd(value, root=root)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The body is not UTF-8 at byte {error.start}.", param=param, code="invalid_json"
        ) from None
    except RecursionError:
        raise RequestError(
            "The JSON is nested too deep.", param=param, code="invalid_json"
        ) from None
    except ValueError as error:
        raise RequestError(
            f"{root or 'The body'} is not valid JSON: {error}.", param=param, code="invalid_json"
        ) from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return value


def _refuse_odd(value: Any, *, root: str) -> None:
    for location, leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            param = json_path(location, root=root)
            raise RequestError(
                f"{param or 'The body'} must be a finite number, got {leaf!r}.", param=param or None
            )
        if isinstance(leaf, str) and not _is_whole(leaf):
            param = json_path(location, root=root)
            raise RequestError(
                f"{param or 'The body'} holds half of a surrogate pair, which is no character.",
                param=param or None,
            )


def _leaves(value: Any, location: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*location, key), key
            yield from _leaves(part, (*location, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _leaves(part, (*location, i))
    else:
        yield location, value


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body is over {limit} bytes, the most this route takes.",
        status=413,
        code="body_too_large",
        # Without `connection: close`: uvicorn then throws the rest of the body away as it comes.
        # To close at once would reset the connection, and the client would never see why.
    )

"""The outermost layer: a request's id, its place in the metrics, and the net under all errors."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serving.errors import error_response
from trimtab.serving.metrics import Metrics

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


class RequestContext:
    """ASGI middleware around the whole app.

    It echoes `x-request-id` (or makes one) on every answer, errors too, counts the answer under
    its route's template, and turns what nobody caught into a 500 without insides.

    Args:
        app: the app inside.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = safe_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        began = time.perf_counter()
        try:
            await self.app(scope, receive, stamped)
        except Exception as error:
            if status is not None:
                raise  # Too late for another answer; the server must cut the connection.
            await error_response(error)(scope, receive, stamped)
        finally:
            # The template, never the path: a path of the client's choice would make a new time
            # series a request.
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.duration.labels(route).observe(time.perf_counter() - began)


def safe_id(given: str | None) -> str:
    """Return the client's request id if it is harmless in headers and logs, else a fresh one."""
    if given is not None and _SAFE_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex

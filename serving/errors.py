"""Errors as clients meet them: OpenAI's body, with the JSON path in `param`."""

from __future__ import annotations

import http
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ExceptionHandler

from trimtab.steering.errors import TrimtabError

log = logging.getLogger("trimtab.serving")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(TrimtabError):
    """A request that is refused before it reaches the engine.

    Args:
        message: one or two full sentences.
        param: JSON path of the field at fault.
        status: HTTP status.
        code: OpenAI's word for it, or ours.
        headers: HTTP headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str = "invalid_request",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code
        self.headers = headers or {}


def error_body(
    message: str, *, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object, `type` chosen by the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers for any exception.

    What is not a `TrimtabError` is our own fault: it is logged with its traceback and the client
    learns nothing of its insides.
    """
    if isinstance(error, TrimtabError):
        headers = dict(getattr(error, "headers", {}))
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        if error.status == 500:
            log.error("%s: %s", type(error).__name__, error.message, exc_info=error)
        body = error_body(error.message, status=error.status, param=error.param, code=error.code)
        return error.status, body, headers
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    message = "The server failed on this request; its log has the details under the x-request-id."
    return 500, error_body(message, status=500, code="internal_error"), {}


def error_response(error: BaseException) -> JSONResponse:
    """Return the HTTP response for an exception."""
    status, body, headers = error_of(error)
    return JSONResponse(body, status_code=status, headers=headers)


async def _on_trimtab_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    method, path = request.method[:16], request.url.path[:200]
    if error.status_code == 404:
        message, code = f"There is no {method} {path}; /docs lists the routes.", "route_not_found"
    elif error.status_code == 405:
        message, code = f"{path} does not take {method}; /docs lists the routes.", "wrong_method"
    else:
        phrase = http.HTTPStatus(error.status_code).phrase
        message, code = f"{error.detail or phrase}.", "invalid_request"
    body = error_body(message, status=error.status_code, code=code)
    headers = dict(error.headers or {})
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app leave in OpenAI's body."""
    handlers: dict[type[Exception], ExceptionHandler] = {
        TrimtabError: _on_trimtab_error,
        HTTPException: _on_http_exception,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)

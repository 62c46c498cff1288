"""OpenAI's list object."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


def list_response(data: list[dict[str, Any]], **more: Any) -> JSONResponse:
    """Return `{"object": "list", "data": [...]}` with further fields after it."""
    return JSONResponse({"object": "list", "data": data, **more})


def deleted_response(name: str, *, kind: str) -> JSONResponse:
    """Return OpenAI's answer to a deletion."""
    return JSONResponse({"id": name, "object": kind, "deleted": True})

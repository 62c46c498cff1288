"""How much a stranger may send to the page: bounded bodies, and no file for its disk."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.ui.page.api import MAX_FILE_BYTES

# A file comes as base64, with a form around it.
MAX_BODY_BYTES = MAX_FILE_BYTES * 4 // 3 + 2**20


class Bounds:
    """ASGI middleware that refuses bodies that are too large, and Gradio's uploads.

    Gradio would put an upload on the disk and leave it there. The page's own (`upload.js`) travel
    in the event that uses them.

    Args:
        app: Gradio's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            refused = _refusal(scope)
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _refusal(scope: Scope) -> PlainTextResponse | None:
    length = Headers(scope=scope).get("content-length", "")
    if scope["path"].rstrip("/").endswith("/upload"):
        return PlainTextResponse("The page keeps no files.", status_code=403)
    if not length.isdigit():
        return PlainTextResponse("A body needs its length.", status_code=411)
    if int(length) > MAX_BODY_BYTES:
        said = f"{int(length)} bytes are too many; the page takes {MAX_BODY_BYTES}."
        return PlainTextResponse(said, status_code=413)
    return None

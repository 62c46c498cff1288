"""How much a stranger may send to the page, and how much of it may lie on the disk."""

from __future__ import annotations

from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_UPLOAD_BYTES = 4 * 2**20
MAX_BODY_BYTES = MAX_UPLOAD_BYTES + 2**20  # a file, and what a form puts around it
MAX_STORED_BYTES = 64 * 2**20
KEPT_S = 600
"""An upload is deleted once it was read; one that nobody reads, after this time."""


class Bounds:
    """ASGI middleware: bodies of a bounded size, and no upload while too much lies in the folder.

    Args:
        app: Gradio's.
        folder: where it puts uploads.
    """

    def __init__(self, app: ASGIApp, *, folder: Path) -> None:
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdigit():
            await _refused("A body needs its length.", 411)(scope, receive, send)
            return
        if int(length) > MAX_BODY_BYTES:
            said = f"{int(length)} bytes are too many; the page takes {MAX_BODY_BYTES}."
            await _refused(said, 413)(scope, receive, send)
            return
        if scope["path"].endswith("/upload"):
            stored = await run_in_threadpool(stored_bytes, self.folder)
            if stored + int(length) > MAX_STORED_BYTES:
                said = "Too many files were uploaded in the last minutes; try again later."
                await _refused(said, 429)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def stored_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, those that vanish meanwhile left out."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _refused(sentence: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=status)

"""The frame around Gradio's page: a policy that lets it reach its own server alone."""

from __future__ import annotations

import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio makes its components' templates by `new Function` and its styles inline.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
# What would name other places, and a manifest that is looked for where the server has none.
_OTHERS = re.compile(
    rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>\s*|<link\s+rel="manifest"[^>]*>\s*'
)
# No file of ours, no request: the icon is in the link itself.
_ICON = (
    b'<link rel="icon" href="data:image/svg+xml,<svg xmlns=\'http://www.w3.org/2000/svg\' '
    b"viewBox='0 0 16 16'><path d='M2 12L14 3v9z' fill='%230b63ce'/></svg>\">"
)


class Shell:
    """ASGI middleware that mends the page's HTML and sets the headers of all its answers.

    Args:
        app: Gradio's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: Message | None = None
        html = b""

        async def sent(message: Message) -> None:
            nonlocal held, html
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
                if headers.get("content-type", "").startswith("text/html"):
                    held = message
                    return
            elif held is not None:
                html += message.get("body", b"")
                if message.get("more_body", False):
                    return
                html = mended(html)
                MutableHeaders(scope=held)["content-length"] = str(len(html))
                await send(held)
                held = None
                message = {"type": "http.response.body", "body": html}
            await send(message)

        await self.app(scope, receive, sent)


def mended(html: bytes) -> bytes:
    """Return the page's HTML with its icon, and without what names other places."""
    return _OTHERS.sub(b"", html).replace(b"<head>", b"<head>" + _ICON, 1)

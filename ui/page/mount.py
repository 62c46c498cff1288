"""The page beside a server in one process, without making its start any slower."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.hang_up import HangUp

PATH = "/ui"


class NoPageError(TrimtabError):
    """The page's libraries are not installed."""

    code = "page_unavailable"


def check_installed() -> None:
    """Look for Gradio, without importing it.

    Raises:
        NoPageError: it is not there.
    """
    if importlib.util.find_spec("gradio") is None:
        raise NoPageError("The page needs Gradio: pip install 'trimtab[ui]'.")


class Page:
    """ASGI middleware that answers what lies under `PATH` itself and passes on all else.

    Gradio takes seconds to import. That is done in a thread once the app has started, so the port
    opens as early as without a page; whoever asks for the page meanwhile waits.

    Args:
        app: the app inside.
        url: the server's own address, which the page talks to as any client does.
    """

    def __init__(self, app: FastAPI, *, url: str) -> None:
        self.app: ASGIApp = app
        self._url = url
        self._made: asyncio.Task[ASGIApp] | None = None
        self._open = AsyncExitStack()
        self._page = HangUp(self._answer)
        lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def with_page(within: FastAPI) -> AsyncIterator[Any]:
            self._made = asyncio.create_task(self._make())
            async with lifespan(within) as state:
                try:
                    yield state
                finally:
                    self._made.cancel()
                    await asyncio.gather(self._made, return_exceptions=True)
                    await self._open.aclose()

        app.router.lifespan_context = with_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == PATH or path.startswith(f"{PATH}/")):
            await self.app(scope, receive, send)
            return
        await self._page(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._made is not None  # requests come after the start
        try:
            page = await asyncio.shield(self._made)
        except Exception as error:
            said = f"The page could not be made: {type(error).__name__}: {error}\\n"
            await PlainTextResponse(said, status_code=500)(scope, receive, send)
            return
        await page(scope, receive, send)

    async def _make(self) -> ASGIApp:
        app = await asyncio.to_thread(_page_app, self._url)
        await self._open.enter_async_context(app.router.lifespan_context(app))
        return app

    def hang_up(self) -> None:
        """End every open request of the page, as `HangUp.hang_up` does."""
        self._page.hang_up()


def _page_app(url: str) -> FastAPI:
    from trimtab.ui.page.api import Api
    from trimtab.ui.page.app import page_app

    return page_app(Api(url))

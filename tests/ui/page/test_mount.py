"""The page beside a server: what it answers, and what it never holds up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import HTMLResponse, StreamingResponse

from trimtab.ui.page import mount
from trimtab.ui.page.bounds import MAX_BODY_BYTES, Bounds
from trimtab.ui.page.mount import NoPageError, Page, check_installed
from trimtab.ui.page.shell import POLICY, Shell


def server() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> str:
        return "models"

    return app


def inner(events: list[str]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        events.append("opened")
        yield
        events.append("closed")

    app = FastAPI(lifespan=lifespan)

    @app.get("/ui/hello")
    def hello() -> str:
        return "page"

    @app.get("/ui/endless")
    async def endless() -> StreamingResponse:
        async def forever() -> AsyncIterator[bytes]:
            events.append("asked")
            try:
                while True:
                    yield b"."
                    await asyncio.sleep(0.01)
            finally:
                events.append("hung up")

        return StreamingResponse(forever())

    return app


@asynccontextmanager
async def at(page: Page, app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the page and the app in it, while both are up."""
    transport = httpx.ASGITransport(page)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def test_the_server_answers_before_the_page_is_made(monkeypatch: pytest.MonkeyPatch):
    """An import of seconds must not keep /health and the model's load waiting."""
    may_come = threading.Event()
    events: list[str] = []

    def slowly(url: str) -> FastAPI:
        may_come.wait(30)
        return inner(events)

    monkeypatch.setattr(mount, "_page_app", slowly)

    async def play() -> None:
        app = server()
        async with at(Page(app, url="http://test"), app) as client:
            asked = asyncio.create_task(client.get("/ui/hello"))
            assert (await client.get("/v1/models")).json() == "models"
            assert not asked.done()
            may_come.set()
            assert (await asked).json() == "page"
            assert (await client.get("/uix")).status_code == 404  # the server's, not the page's
            assert events == ["opened"]
        assert events == ["opened", "closed"]

    asyncio.run(play())


def test_a_page_that_cannot_be_made_says_why_and_leaves_the_server(monkeypatch: pytest.MonkeyPatch):
    """A broken Gradio must not take the API down."""

    def broken(url: str) -> FastAPI:
        raise RuntimeError("no such theme")

    monkeypatch.setattr(mount, "_page_app", broken)

    async def play() -> None:
        app = server()
        async with at(Page(app, url="http://test"), app) as client:
            answer = await client.get("/ui")
            assert answer.status_code == 500
            assert "no such theme" in answer.text
            assert (await client.get("/v1/models")).status_code == 200

    asyncio.run(play())


def test_hanging_up_ends_what_a_browser_would_keep_open(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C would wait half a minute for a tab that somebody left open."""
    events: list[str] = []
    monkeypatch.setattr(mount, "_page_app", lambda url: inner(events))

    async def play() -> None:
        app = server()
        page = Page(app, url="http://test")
        async with at(page, app) as client:
            await client.get("/ui/hello")
            open_one = asyncio.create_task(client.get("/ui/endless"))
            while "asked" not in events:
                await asyncio.sleep(0.01)
            page.hang_up()
            assert (await asyncio.wait_for(open_one, timeout=5)).status_code == 200
        assert "hung up" in events

    asyncio.run(play())


def test_without_gradio_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """An ImportError's traceback helps nobody."""
    monkeypatch.setattr(mount.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoPageError, match=r"pip install 'trimtab\[ui\]'"):
        check_installed()


def test_the_pages_html_names_no_other_place():
    """Gradio's page links to pictures and a manifest elsewhere; the policy is on every answer."""
    html = (
        "<!doctype html><head><meta charset='utf-8'>"
        '<link rel="manifest" href="/manifest.json" />'
        '<meta\n property="og:image"\n content="https://elsewhere.example/x.jpg"\n/>'
        '<meta name="twitter:card" content="x" /><title>t</title></head><body>ünï</body>'
    )
    app = FastAPI()
    app.add_middleware(Shell)

    @app.get("/ui/")
    def page() -> HTMLResponse:
        return HTMLResponse(html)

    @app.get("/ui/data")
    def data() -> dict[str, Any]:
        return {"og": '<meta property="og:image" content="https://kept.example/">'}

    async def play() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/ui/")
            assert "elsewhere" not in answer.text
            assert "manifest" not in answer.text
            assert "twitter" not in answer.text
            assert "<title>t</title>" in answer.text
            assert "ünï" in answer.text
            assert int(answer.headers["content-length"]) == len(answer.content)
            assert answer.headers["content-security-policy"] == POLICY
            other = await client.get("/ui/data")
            assert "kept" in other.text
            assert other.headers["content-security-policy"] == POLICY

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/ui/gradio_api/queue/join", 100, 200),
        ("/ui/gradio_api/queue/join", MAX_BODY_BYTES + 1, 413),
        ("/ui/gradio_api/queue/join", None, 411),
        ("/ui/gradio_api/upload", 100, 403),
        ("/ui/gradio_api/upload/", 100, 403),
    ],
)
def test_a_stranger_cannot_fill_the_memory_or_the_disk(path: str, size: int | None, status: int):
    """Gradio bounds no body, and keeps what is uploaded to it for good."""
    app = FastAPI()
    app.add_middleware(Bounds)

    @app.post("/{anything:path}")
    def taken(anything: str) -> str:
        return anything

    async def some() -> AsyncIterator[bytes]:
        yield b"x"

    async def play() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            if size is None:
                answer = await client.post(path, content=some())
            else:
                headers = {"content-length": str(size)}
                answer = await client.post(path, content=b"x", headers=headers)
            assert answer.status_code == status

    asyncio.run(play())

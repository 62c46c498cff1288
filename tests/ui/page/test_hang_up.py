"""Ctrl-C while somebody looks at the page: no waiting, no traceback, answers that end in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from served_program import started
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.ui.page.hang_up import HangUp

SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}


@pytest.mark.parametrize("command", ["serve", "ui"])
def test_ctrl_c_with_an_open_page(command: str, toy_folder, home):
    """uvicorn waits for what browsers keep open, cancels it and prints a traceback for each."""
    args = (
        ("serve", str(toy_folder)) if command == "serve" else ("ui", "--server", "http://[::1]:9")
    )
    with (
        started(*args) as served,
        httpx.stream("GET", f"{served.url}/ui/gradio_api/heartbeat/one", timeout=60) as kept,
    ):
        pieces = kept.iter_raw()
        assert next(pieces)
        pressed = time.monotonic()
        served.press_ctrl_c()
        for _ in pieces:  # raises if the answer ends in its middle
            pass
        took = time.monotonic() - pressed
    assert served.lines[-1] == "Stopped.\n"
    assert "ERROR" not in served.log
    assert took < 15, took


@asynccontextmanager
async def asked(app: ASGIApp) -> AsyncIterator[tuple[HangUp, asyncio.Task[None], list[Message]]]:
    """A request to `app` that is under way, and what it has been answered."""
    hang_up, sent = HangUp(app), list[Message]()

    async def receive() -> Message:
        raise AssertionError("these apps read no body")

    async def send(message: Message) -> None:
        sent.append(message)

    task = asyncio.create_task(hang_up(SCOPE, receive, send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    yield hang_up, task, sent
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def stuck(*first: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in first:
            await send(message)
        await asyncio.Event().wait()

    return app


START = {"type": "http.response.start", "status": 200, "headers": []}
LONG = {**START, "headers": [(b"Content-Length", b"9")]}
PIECE = {"type": "http.response.body", "body": b"a", "more_body": True}
LAST = {"type": "http.response.body", "body": b"b"}
END = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ((START, PIECE), [END]),
        ((START,), [END]),
        ((START, LAST), []),
        ((LONG, PIECE), []),
    ],
    ids=["in its middle", "before its body", "after its end", "shorter than announced"],
)
def test_an_answer_is_ended_where_it_can_be(said: tuple[Message, ...], then: list[Message]):
    """A second end, or one before the announced length, is an error of its own in uvicorn."""

    async def play() -> None:
        async with asked(stuck(*said)) as (hang_up, task, sent):
            hang_up.hang_up()
            await asyncio.wait_for(task, 5)
            assert sent == [*said, *then]

    asyncio.run(play())


def test_a_request_that_has_no_answer_yet_is_refused():
    """uvicorn answers 500 to a request that ends without a word."""

    async def play() -> None:
        async with asked(stuck()) as (hang_up, task, sent):
            hang_up.hang_up()
            await asyncio.wait_for(task, 5)
            assert sent[0]["status"] == 503
            assert b"stopping" in sent[1]["body"]

    asyncio.run(play())


def test_cancelled_by_somebody_else_it_stays_cancelled():
    """A middleware that swallows cancellation keeps its server from ending."""

    async def play() -> None:
        async with asked(stuck(START)) as (_, task, sent):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sent == [START]

    asyncio.run(play())


def test_before_any_request_and_after_all_there_is_nothing_to_do():
    """Ctrl-C before the first visit must not fail."""

    async def play() -> None:
        HangUp(stuck()).hang_up()
        async with asked(PlainTextResponse("done")) as (hang_up, task, sent):
            await task
            hang_up.hang_up()
            await asyncio.sleep(0.01)
            assert len(sent) == 2

    asyncio.run(play())

"""Presses on the Build tab that come fast, and builds that go while they are watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest

from trimtab.ui.page import build_watch
from trimtab.ui.page.api import RefusedError
from trimtab.ui.page.build_tab import BuildTab
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.visitor import Visitors

ME = cast(gr.Request, SimpleNamespace(session_hash="me"))
NAME, CONCEPT, REPLACES = 0, 2, -1


class FakeServer:
    """Takes every build, as a server does that is asked to replace; each runs until it is told."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Any]] = {}
        self.n_lists = 0
        self.may_list = asyncio.Event()
        self.may_list.set()

    async def get(self, path: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        if path == build_watch.PATH:
            self.n_lists += 1
            await self.may_list.wait()
            return {"data": [dict(state) for state in self.states.values()]}
        state = self.states.get(path.rpartition("/")[2])
        if state is None:
            raise RefusedError("There is no such build.", http_status=404)
        return dict(state)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        id = f"build-{len(self.states)}"
        state = {"id": id, "kind": body["kind"], "artifact": body["id"], "position": 0}
        progress = {"status": "running", "stage": "reading", "done": 1, "total": 2}
        self.states[id] = {**state, **progress, "elapsed_s": 1.0, "error": None, "result": None}
        return self.states[id]


class Building:
    """Somebody's Build tab over the fake server."""

    def __init__(self) -> None:
        self.server = FakeServer()
        visitors = Visitors(cast(Any, self.server))
        with gr.Blocks(), gr.Tabs() as tabs:
            with gr.Tab("Chat"):
                chat = ChatTab(visitors)
            with gr.Tab("Build") as tab:
                self.tab = BuildTab(visitors, tab=tab, tabs=tabs, chat=chat)

    def press(self, name: str) -> AsyncIterator[list[Any]]:
        """Press Build for a vector of this name, which may be replaced."""
        vector, classifier = self.tab.vector.inputs, self.tab.classifier.inputs
        values = [field.value for field in vector]
        values[NAME], values[CONCEPT], values[REPLACES] = name, "warm", True
        return self.tab._started(ME, "vector", *values, *(field.value for field in classifier))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Leave no time between two questions."""
    monkeypatch.setattr(build_watch, "_EVERY_S", 0)


async def until_said(shown: AsyncIterator[list[Any]], part: str) -> list[Any]:
    """Return the first update whose notice or stage has a part."""
    async for values in shown:
        if any(part in str(value) for value in (values[0], values[3])):
            return values
    raise AssertionError(f"never said: {part}")


def test_a_second_press_does_not_build_the_same_again():
    """Catches a double click that builds twice what may be replaced."""

    async def play() -> tuple[list[Any], int]:
        it = Building()
        first, second = it.press("warm"), it.press("warm")
        _, told = await asyncio.wait_for(
            asyncio.gather(until_said(first, "reading"), until_said(second, "already")), 5
        )
        return told, len(it.server.states)

    told, n_builds = asyncio.run(play())
    assert "A vector warm is being built already" in told[0]
    assert n_builds == 1


def test_no_build_can_be_chosen():
    """Catches an error when the keyboard leaves the empty list of builds."""

    async def play() -> list[list[Any]]:
        return await _rest(Building().tab.outcome._chosen(ME, None))

    assert asyncio.run(play()) == []


def test_the_build_that_was_watched_before_does_not_come_back():
    """Catches a Cancel that ends another build than the one whose progress is shown."""

    async def play() -> list[list[Any]]:
        it = Building()
        watching = it.tab.visitors.of(ME).watching
        first = it.press("warm")
        await anext(first)
        late = asyncio.create_task(_rest(first))
        async with asyncio.timeout(5):
            while not it.server.states:
                await asyncio.sleep(0)
            it.server.may_list.clear()
            # Its own state has come, and what the server builds else has not.
            while it.server.n_lists < 2:
                await asyncio.sleep(0)
            it.server.states["build-1"] = {**it.server.states["build-0"], "id": "build-1"}
            await anext(watching.watch(cast(Any, it.server), "build-1"))
            it.server.may_list.set()
            return await late

    assert asyncio.run(play()) == []


async def _rest(shown: AsyncIterator[list[Any]]) -> list[list[Any]]:
    return [values async for values in shown]


def test_a_build_that_the_server_forgot_leaves_no_progress():
    """Catches a bar that stands still for ever beside a Cancel that can end nothing."""

    async def play() -> list[Any]:
        it = Building()
        shown = it.press("warm")
        await until_said(shown, "reading")
        it.server.states.clear()
        return await asyncio.wait_for(until_said(shown, "no such build"), 5)

    _, which, cancel, stage, progress, *_ = asyncio.run(play())
    assert (which.value, stage, progress) == (None, "", "")
    assert not cancel.interactive


@pytest.mark.parametrize("number", [0, None])
def test_a_classifier_reads_own_answers_when_it_is_asked_to(number):
    """Catches the browser's 0 in a number field that was never filled in: nothing could be built.

    What Gradio shows later than the page, it shows with 0 for None.
    """

    async def play() -> Any:
        return Building().tab.classifier

    form = asyncio.run(play())
    values = [field.value for field in form.inputs]
    assert values[3] == 0
    values[2] = "tone"
    assert "own_answer_tokens" not in form.body(*[*values[:3], number, *values[4:]])[0]
    assert form.body(*[*values[:3], 48, *values[4:]])[0]["own_answer_tokens"] == 48

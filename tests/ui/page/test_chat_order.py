"""Presses that follow each other faster than the server answers take effect in their order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from chat_wire import FakeServer

from trimtab.ui.client import ServerError
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.chat_view import PLAIN
from trimtab.ui.page.conversation import Conversation
from trimtab.ui.page.visitor import Visitors

ME = cast(gr.Request, SimpleNamespace(session_hash="me"))
PANEL = {"vectors": [{"id": "warm", "scale": 1.0}]}


class SlowCheck(FakeServer):
    """Lets a check of the steering wait until `checked` is set; refuses those in `refused`."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = asyncio.Event()
        self.checked.set()
        self.n_checks = 0
        self.refused: set[int] = set()

    async def get(self, path: str) -> dict[str, Any]:
        return {"data": [{"id": "m"}]}

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/check"):
            self.n_checks += 1
            await self.checked.wait()
            if self.n_checks in self.refused:
                raise ServerError("Too strong.")
            return {"dose": {"3": 0.1}}
        return await super().post(path, body)


class Pressing:
    """A chat of one answered prompt, `First`, and presses on its buttons."""

    def __init__(self) -> None:
        self.server = SlowCheck()
        visitors = Visitors(cast(Any, self.server))
        with gr.Blocks():
            self.tab = ChatTab(visitors)
        self.chat: Conversation = visitors.of(ME).chat

    def press(self, name: str, prompt: str = "Second") -> asyncio.Task[list[Any]]:
        """Press, and return the task of what the page is told."""
        choices = (prompt, PLAIN, PANEL, 8, 0.0, None)
        return asyncio.create_task(
            {
                "send": lambda: _all(self.tab._sent(ME, *choices)),
                "slide": lambda: _all(self.tab._steered_anew(ME, *choices)),
                "new": lambda: _one(self.tab._begun_anew(ME)),
                "stop": lambda: _one(self.tab._stopped(ME)),
            }[name]()
        )


async def _all(shown: Any) -> list[Any]:
    return [one async for one in shown]


async def _one(done: Any) -> list[Any]:
    return [await done]


def pressed(*names: str, words_wait: bool = False) -> Conversation:
    """Return the chat after presses that come while the first one's check is under way."""

    async def play() -> Conversation:
        it = Pressing()
        await it.press("send", "First")
        it.server.checked.clear()
        if words_wait:
            it.server.go = asyncio.Event()
        tasks = []
        for name in names:
            tasks.append(it.press(name))
            await asyncio.sleep(0)
        it.server.checked.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        return it.chat

    return asyncio.run(play())


def prompts(chat: Conversation) -> list[str]:
    return [turn.settings.prompt for turn in chat.turns]


def test_a_slider_moved_right_after_send_answers_what_was_sent():
    """Catches a slider that puts the old prompt in the new one's place, which is then lost."""
    chat = pressed("send", "slide")
    assert prompts(chat) == ["First", "Second"]
    assert chat.turns[-1].steered.finish == "stop"


@pytest.mark.parametrize("names", [("slide", "new"), ("send", "new"), ("send", "slide", "new")])
def test_a_new_chat_is_empty_whatever_was_pressed_before(names: tuple[str, ...]):
    """Catches a turn that comes after New chat, and a slider that replaces a turn that is gone."""
    assert prompts(pressed(*names)) == []


def test_stop_ends_what_was_just_sent():
    """Catches a Stop that is lost because the answer has not begun."""
    chat = pressed("send", "stop", words_wait=True)
    assert {chat.turns[-1].side(side).finish for side in ("baseline", "steered")} == {"stopped"}


def test_send_pressed_twice_asks_once():
    """Catches a double click that leaves an empty turn behind."""
    assert prompts(pressed("send", "send")) == ["First", "Second"]


def test_of_quick_moves_of_a_slider_the_last_is_checked_and_spoken_of():
    """Catches a refusal of settings that nobody asks for any more, and checks that queue up."""

    async def play() -> None:
        it = Pressing()
        await it.press("send", "First")
        it.server.checked.clear()
        it.server.refused = {2}  # the first move is half of a change
        moves = [it.press("slide")]
        await asyncio.sleep(0)
        moves += [it.press("slide") for _ in range(3)]
        await asyncio.sleep(0)
        it.server.checked.set()
        first, *others = await asyncio.wait_for(asyncio.gather(*moves), 5)
        assert it.server.n_checks == 3  # of Send, of the first move, of the last
        assert first == others[0] == others[1] == []
        assert others[-1]
        assert it.chat.turns[-1].steered.finish == "stop"

    asyncio.run(play())


def test_gauges_of_an_ended_chat_do_not_come_back():
    """Catches a run whose last picture comes after New chat has cleared the page."""

    async def play() -> None:
        it = Pressing()
        it.server.go = asyncio.Event()
        sent = it.press("send")
        while not (sent.done() or (it.chat.turns and it.chat.turns[-1].steered.pieces)):
            await asyncio.sleep(0)
        await it.press("new")
        shown = await asyncio.wait_for(sent, 5)
        assert [one for one in shown if "Ask something below" in one[0]] == []

    asyncio.run(play())


def test_who_leaves_while_the_steering_is_checked_is_not_answered():
    """Catches a run that begins after its visitor has gone, and which nobody would end."""

    async def play() -> None:
        it = Pressing()
        it.server.checked.clear()
        sent = it.press("send")
        await asyncio.sleep(0)
        await it.tab.visitors.leave(ME)
        it.server.checked.set()
        await asyncio.wait_for(sent, 5)
        assert it.server.bodies == []

    asyncio.run(play())

"""Both sides of a run, against a server of canned answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from chat_wire import RECEIPT, FakeServer

from trimtab.ui.client import ServerError
from trimtab.ui.page.chat_run import frame_seconds, run
from trimtab.ui.page.conversation import SIDES, Conversation, Piece, Turn
from trimtab.ui.page.run_settings import read_settings


async def ran(server: Any, chat: Conversation, turn: Turn, sides: tuple[str, ...] = SIDES) -> int:
    chat.turns.append(turn)
    n = 0
    async for _ in run(server, chat, turn, model="m", sides=sides):
        n += 1
    return n


def steered() -> Turn:
    return Turn(read_settings({"prompt": "Go", "vectors": [{"id": "warm", "scale": 1.0}]}))


def test_only_the_steered_side_is_steered_and_both_are_read_by_the_unsteered_model():
    """Steering in both bodies would compare a thing with itself."""
    server, chat, turn = FakeServer(), Conversation(), steered()
    asyncio.run(ran(server, chat, turn))
    assert sorted("steering" in body for body in server.bodies) == [False, True]
    for side in SIDES:
        answer = turn.side(side)
        assert answer.text == "One two three"
        assert answer.finish == "stop"
        assert answer.surprise == [(3, 1.0), (7, 2.0), (13, 3.0)]
    assert turn.steered.receipt == RECEIPT


def test_an_answer_without_a_receipt_is_not_shown_as_steered():
    """A server that ignores `steering` would pass for one that steers."""
    server, turn = FakeServer(), steered()
    server.receipt = None
    asyncio.run(ran(server, Conversation(), turn))
    assert turn.steered.finish == "failed"
    assert "no account" in (turn.steered.error or "")
    assert turn.baseline.error is None


def test_one_sides_failure_leaves_the_other():
    """The baseline is still worth reading."""
    server, turn = FakeServer(), steered()
    server.failure = "The model broke."
    asyncio.run(ran(server, Conversation(), turn))
    assert turn.steered.error == "The model broke."
    assert turn.steered.text == "One"


def test_stopping_keeps_what_came_and_closes_the_streams():
    """A stream left open would go on generating for nobody."""

    async def play() -> tuple[FakeServer, Turn]:
        server, chat, turn = FakeServer(), Conversation(), steered()
        server.go = asyncio.Event()
        running = asyncio.create_task(ran(server, chat, turn))
        while not (turn.baseline.pieces and turn.steered.pieces):
            await asyncio.sleep(0)
        chat.stop()
        await asyncio.wait_for(running, 5)
        assert not chat.is_running
        return server, turn

    server, turn = asyncio.run(play())
    assert server.closed == 2
    assert {turn.side(side).finish for side in SIDES} == {"stopped"}
    assert turn.steered.text == "One"


def test_a_new_run_takes_the_place_of_the_old_one():
    """A slider moved twice must not show the first answer after the second."""

    async def play() -> None:
        server, chat = FakeServer(), Conversation()
        first, second = steered(), steered()
        server.go = asyncio.Event()
        old = asyncio.create_task(ran(server, chat, first))
        while not first.steered.pieces:
            await asyncio.sleep(0)
        chat.turns.clear()
        await asyncio.wait_for(ran(FakeServer(), chat, second), 5)
        await asyncio.wait_for(old, 5)
        assert second.steered.finish == "stop"
        assert first.steered.finish == "stopped"

    asyncio.run(play())


def test_each_side_goes_on_from_its_own_answers():
    """The steered side would otherwise read the unsteered side's words as its own."""
    chat, turn, after = Conversation(), steered(), steered()
    chat.turns = [turn, after]
    turn.baseline.pieces.append(Piece("plain"))
    assert chat.messages("baseline", until=after)[1]["content"] == "plain"
    assert [m["role"] for m in chat.messages("steered", until=after)] == ["user"]


def test_an_unread_answer_says_why():
    """Silence where the surprise stands would look like none."""
    server, turn = FakeServer(), steered()

    async def refuse(path: str, body: dict[str, Any]) -> dict[str, Any]:
        raise ServerError("No scoring here.")

    server.post = refuse  # type: ignore[method-assign]
    asyncio.run(ran(server, Conversation(), turn))
    assert turn.steered.unread == "No scoring here."
    assert turn.steered.finish == "stop"


@pytest.mark.parametrize("sides", [("steered",), SIDES])
def test_a_run_shows_its_end(sides: tuple[str, ...]):
    """The last frame must not say that it still runs."""
    server, chat, turn = FakeServer(), Conversation(), steered()
    shown: list[bool] = []

    async def play() -> None:
        chat.turns.append(turn)
        async for _ in run(server, chat, turn, model="m", sides=sides):  # type: ignore[arg-type]
            shown.append(chat.is_running)

    asyncio.run(play())
    assert shown[-1] is False


def test_long_answers_are_drawn_less_often():
    """A frame of 2000 tokens takes 40 ms; twelve a second would be half of the server's time."""
    turn = steered()
    few = frame_seconds(turn)
    turn.baseline.pieces = turn.steered.pieces = [Piece("a")] * 2048
    assert few < 0.1
    assert frame_seconds(turn) > 1.0

"""Watching a build: until its end, one at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from trimtab.ui.page import build_watch
from trimtab.ui.page.build_watch import Watching


class Builds:
    """A server whose builds do a step each time they are asked for.

    Args:
        steps: that a build takes.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.asked: list[str] = []

    async def get(self, path: str) -> dict[str, Any]:
        """Answer a build's state."""
        self.asked.append(path)
        done = self.asked.count(path)
        return {"status": "done" if done >= self.steps else "running", "done": done, "at": path}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Leave no time between two questions."""
    monkeypatch.setattr(build_watch, "_EVERY_S", 0)


async def seen(watching: Watching, api: Any, build: str) -> list[int]:
    """Watch a build to its end."""
    return [state["done"] async for state in watching.watch(api, build)]


def test_a_build_is_watched_to_its_end():
    """Catches a watch that stops early, or never."""
    api = Builds(3)
    assert asyncio.run(seen(Watching(), api, "a/../b")) == [1, 2, 3]
    assert set(api.asked) == {"/v1/steering/builds/a%2F..%2Fb"}


def test_a_second_watch_ends_the_first():
    """Catches two builds whose progress is shown in turns in one place."""

    async def both() -> tuple[list[int], list[int], Any]:
        api, watching = Builds(50), Watching()
        first = asyncio.create_task(seen(watching, api, "one"))
        while not api.asked:
            await asyncio.sleep(0)
        second = await seen(watching, api, "two")
        return await first, second, watching.build

    first, second, build = asyncio.run(both())
    assert len(first) < 3
    assert second[-1] == 50
    assert build == "two"


def test_nobody_is_asked_for_who_has_left():
    """Catches a server that is asked twice a second for as long as it lives."""

    async def leave() -> int:
        api, watching = Builds(50), Watching()
        async for _ in watching.watch(api, "one"):  # type: ignore[arg-type]
            watching.stop()
        return len(api.asked)

    assert asyncio.run(leave()) == 1

"""Frames of what grows: none without news, one at the end, and an end to the work when closed."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from trimtab.ui.page.frames import frames


def test_news_between_two_frames_make_one():
    """A frame a token would draw what nobody can see."""

    async def play() -> None:
        changed = asyncio.Event()

        async def work() -> None:
            for _ in range(50):
                changed.set()
                await asyncio.sleep(0.002)

        n = [1 async for _ in frames([asyncio.create_task(work())], changed)]
        assert 2 <= len(n) <= 25

    asyncio.run(play())


def test_the_end_is_drawn_at_once():
    """A long interval must not keep the last words, or a failure, from the eye."""

    async def play() -> None:
        changed = asyncio.Event()
        changed.set()
        tasks = [asyncio.create_task(asyncio.sleep(s)) for s in (0.01, 0.02)]
        start = time.monotonic()
        states = [
            [task.done() for task in tasks]
            async for _ in frames(tasks, changed, interval_s=lambda: 30.0)
        ]
        assert states[-1] == [True, True]
        assert time.monotonic() - start < 10

    asyncio.run(play())


def test_a_task_that_never_began_ends_the_frames():
    """Cancelled before its first step it runs no `finally` that could say so."""

    async def play() -> None:
        task = asyncio.create_task(asyncio.sleep(30))
        task.cancel()
        n = [1 async for _ in frames([task], asyncio.Event())]
        assert len(n) == 1

    asyncio.run(asyncio.wait_for(play(), 10))


def test_closed_early_the_work_ends():
    """A visitor who leaves must not leave a generation behind."""

    async def play() -> None:
        changed = asyncio.Event()
        changed.set()
        task = asyncio.create_task(asyncio.sleep(30))
        async with aclosing(frames([task], changed)) as drawn:
            async for _ in drawn:
                break
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(play(), 10))

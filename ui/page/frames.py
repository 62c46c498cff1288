"""When to draw what grows: often enough for the eye, seldom enough for the server's other work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

FRAME_S = 0.08  # a person sees no more than a dozen changes a second


async def frames(
    tasks: Sequence[asyncio.Task[Any]],
    changed: asyncio.Event,
    *,
    interval_s: Callable[[], float] = lambda: FRAME_S,
) -> AsyncGenerator[None]:
    """Yield when there is something new to draw, and a last time when all tasks are done.

    Closing the iterator cancels the tasks and waits for them.

    Args:
        tasks: do the work.
        changed: set by them when there is something new.
        interval_s: seconds until the next frame, asked after each.
    """
    for task in tasks:
        # A task that is cancelled before its first step runs no `finally` of its own.
        task.add_done_callback(lambda _: changed.set())
    try:
        while True:
            await changed.wait()
            changed.clear()
            is_over = all(task.done() for task in tasks)
            yield
            if is_over:
                return
            await asyncio.wait(tasks, timeout=interval_s())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

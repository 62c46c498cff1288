"""One visitor's explanation on its way: what the server says of it, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.api import Api
from trimtab.ui.page.frames import frames
from trimtab.ui.page.why_question import How, Question

_PATH = "/v1/attributions"


@dataclass
class Explanation:
    """A question and what came of it.

    Attributes:
        question: what is asked.
        how: by which method.
        results: wire forms of what is done, in the order of the question's sides.
        progress: the server's last word on the one under way.
        error: the sentence of a failure.
        is_cancelled: somebody ended it.
    """

    question: Question
    how: How
    results: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    is_cancelled: bool = False

    @property
    def n_left(self) -> int:
        """How many of the question's sides have no result yet."""
        return len(self.question.sides) - len(self.results)


class Explaining:
    """A visitor's explanations, of which at most one is under way."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._latest: Explanation | None = None

    def stop(self) -> None:
        """End what is under way; the server drops it."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def clear(self) -> None:
        """End what is under way without another word: something else takes its place."""
        self.stop()
        self._latest = None

    def is_latest(self, explanation: Explanation) -> bool:
        """Return whether nothing has taken the place of an explanation."""
        return self._latest is explanation

    async def run(
        self, api: Api, explanation: Explanation, *, model: str
    ) -> AsyncIterator[Explanation]:
        """Ask the server, one side after the other, and yield when there is more to show.

        What was under way before is ended first. Yields at once, then at most 12 times a second,
        and last when it is complete, failed or cancelled; not at all once another has taken its
        place.

        Args:
            api: the server, under the visitor's key.
            explanation: is filled.
            model: the served model's name.
        """
        self.clear()
        self._latest = explanation
        changed = asyncio.Event()
        changed.set()
        task = asyncio.create_task(_ask(api, explanation, model, changed))
        self._task = task
        async with aclosing(frames([task], changed)) as drawn:
            async for _ in drawn:
                if not self.is_latest(explanation):
                    return
                explanation.is_cancelled = task.cancelled()
                yield explanation


async def _ask(api: Api, explanation: Explanation, model: str, changed: asyncio.Event) -> None:
    question = explanation.question
    try:
        for is_steered in question.sides:
            n_left = explanation.n_left
            body = question.body(is_steered=is_steered, model=model, how=explanation.how)
            # One at a time: others wait in the same queue.
            async with aclosing(api.stream(_PATH, body)) as events:
                async for event in events:
                    _take(event, explanation, is_steered=is_steered)
                    changed.set()
            if explanation.n_left == n_left:
                raise ServerError("The server ended the attribution without its result. Try again.")
    except TrimtabError as error:
        explanation.error = error.message


def _take(event: dict[str, Any], explanation: Explanation, *, is_steered: bool) -> None:
    if event.get("object") != "attribution":
        explanation.progress = event
        return
    if is_steered and event.get("steering") is None:
        raise ServerError("The server gave no account of the steering; is it trimtab?")
    explanation.results.append(event)
    explanation.progress = {}

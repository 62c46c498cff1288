"""One run: the same prompt to the unsteered model and the steered one, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.api import Api
from trimtab.ui.page.conversation import SIDES, Answer, Conversation, Piece, Turn
from trimtab.ui.page.frames import FRAME_S, frames

_LONG = 256  # tokens of both answers at which frames begin to come less often
_SCORE_EVERY = 16  # tokens between two readings of a growing answer by the unsteered model


async def run(
    api: Api, conversation: Conversation, turn: Turn, *, model: str, sides: tuple[str, ...]
) -> AsyncIterator[Turn]:
    """Answer a turn's prompt and yield it when there is more to show, at most 12 times a second.

    The longer the answers, the seldomer: drawing them takes time in proportion to their length.

    What ran before in this conversation is stopped first; nothing runs once its visitor has left.
    Ends without yielding again once the turn is not the conversation's last: another took its
    place, or a new chat began.

    Args:
        api: the server, under the visitor's key.
        conversation: holds the turn, and is told of the tasks, so that it can stop them.
        turn: its answers for `sides` are empty.
        model: the served model's name.
        sides: `baseline`, `steered` or both.
    """
    conversation.stop()
    if conversation.is_over:
        return
    changed = asyncio.Event()
    tasks = [
        asyncio.create_task(_answer(api, conversation, turn, side, model, changed))
        for side in sides
    ]
    conversation.tasks, conversation.answering = tasks, [turn.side(side) for side in sides]
    async with aclosing(frames(tasks, changed, interval_s=lambda: frame_seconds(turn))) as drawn:
        async for _ in drawn:
            if conversation.last is not turn:
                return
            yield turn


def frame_seconds(turn: Turn) -> float:
    """Return how long to wait before a turn is drawn again."""
    n_tokens = sum(len(turn.side(side).pieces) for side in SIDES)
    return FRAME_S * max(1.0, n_tokens / _LONG)


async def _answer(
    api: Api, conversation: Conversation, turn: Turn, side: str, model: str, changed: asyncio.Event
) -> None:
    answer = turn.side(side)
    messages = conversation.messages(side, until=turn)
    scorer = _Scorer(api, model, messages, answer, changed)
    try:
        async with aclosing(
            api.stream("/v1/chat/completions", body(turn, side, model, messages))
        ) as events:
            async for event in events:
                _take(event, answer)
                scorer.follow()
                changed.set()
        if side == "steered" and turn.settings.is_steered and answer.receipt is None:
            raise ServerError("The server gave no account of the steering; is it trimtab?")
        await scorer.finish()
    except asyncio.CancelledError:
        answer.finish = answer.finish or "stopped"
        raise
    except TrimtabError as error:
        answer.finish, answer.error = "failed", error.message
    finally:
        scorer.stop()
        changed.set()


def body(turn: Turn, side: str, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return the body of one side's request."""
    settings = turn.settings
    fields: dict[str, Any] = {
        "model": settings.model_name(model) if side == "steered" else model,
        "messages": messages,
        **settings.sampling(),
        "stream": True,
        "logprobs": True,
    }
    if settings.probes:
        fields["probes"] = settings.probes
    if side == "steered" and settings.steering is not None:
        fields["steering"] = settings.steering
    return fields


def _take(event: dict[str, Any], answer: Answer) -> None:
    choice = (event.get("choices") or [{}])[0]
    text = (choice.get("delta") or {}).get("content") or ""
    scored = (choice.get("logprobs") or {}).get("content") or []
    if text or scored:
        answer.pieces.append(
            Piece(
                text,
                tuple(token["token"] for token in scored),
                sum(token["logprob"] for token in scored),
                _readings(choice.get("probes") or {}),
            )
        )
    answer.receipt = event.get("steering") or answer.receipt
    answer.finish = choice.get("finish_reason") or answer.finish


def _readings(probes: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: dict(zip(probe["labels"], probe["tokens"][-1], strict=True))
        for name, probe in probes.items()
        if probe["tokens"]
    }


class _Scorer:
    """Has the unsteered model read the answer as it grows, one reading at a time."""

    def __init__(
        self,
        api: Api,
        model: str,
        messages: list[dict[str, str]],
        answer: Answer,
        changed: asyncio.Event,
    ) -> None:
        self._api = api
        self._model = model
        self._messages = messages
        self._answer = answer
        self._changed = changed
        self._n_prompt: int | None = None
        self._n_read = 0
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Start a reading if there is enough new text and none is under way."""
        n = len(self._answer.pieces)
        if n - self._n_read >= _SCORE_EVERY and (self._task is None or self._task.done()):
            self._n_read = n
            self._task = asyncio.create_task(self._read())

    async def finish(self) -> None:
        """Read the whole answer."""
        if self._task is not None:
            await self._task
        if self._answer.text.strip():
            await self._read()

    def stop(self) -> None:
        """End a reading that is under way."""
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> None:
        said = {"role": "assistant", "content": self._answer.text}
        try:
            if self._n_prompt is None:
                self._n_prompt = len(await self._logprobs(self._messages))
            read = (await self._logprobs([*self._messages, said]))[self._n_prompt :]
        except TrimtabError as error:
            self._answer.unread = error.message
            return
        place, found = 0, []
        for entry in read:
            chosen = next(iter(entry.values()))
            place += len(chosen["decoded_token"])
            found.append((place, -float(chosen["logprob"])))
        self._answer.surprise = found
        self._changed.set()

    async def _logprobs(self, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
        body = {"model": self._model, "messages": messages, "max_tokens": 0, "prompt_logprobs": 0}
        found = await self._api.post("/v1/chat/completions", body)
        return list(found["prompt_logprobs"])

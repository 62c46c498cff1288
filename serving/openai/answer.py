"""What chat and text answers share: identity, token counts, the receipt, the order of chunks."""

from __future__ import annotations

import abc
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from trimtab.serving.engines.base import Delta
from trimtab.serving.generation import Generation
from trimtab.serving.openai.generation_request import GenerationRequest
from trimtab.serving.openai.probe_format import probe_readings
from trimtab.serving.receipt import Receipt
from trimtab.serving.state import ServerState
from trimtab.steering.plan import Plan, ProbeRow, Reader


class Answer(abc.ABC):
    """Turns the deltas of one request into an answer, whole or in chunks.

    Args:
        server: the app's parts.
        request: what was asked.
        plan: its compiled steering, or None.
        probes: what reads its probes.
        prompt_lengths: tokens of each prompt; every prompt has `request.n` choices.
    """

    prefix: str

    def __init__(
        self,
        server: ServerState,
        request: GenerationRequest,
        *,
        plan: Plan | None,
        prompt_lengths: list[int],
        probes: tuple[Reader, ...] = (),
    ) -> None:
        self.request = request
        self._probes = probes
        self.n_choices = request.n * len(prompt_lengths)
        self._receipt = None if plan is None else Receipt(plan)
        self.prompt_tokens = sum(prompt_lengths)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}
        self._common: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": server.system_fingerprint,
        }

    async def whole(self, generation: Generation) -> BaseModel:
        """Return the whole answer once every choice has finished."""
        async for index, delta in generation.deltas():
            self._note(index, delta)
            self._collect(index, delta)
        async for _ in self._further():
            pass  # what it found is part of what is assembled
        return self._assembled({**self._common, **self._steering(), "usage": self._usage()})

    async def chunks(self, generation: Generation) -> AsyncIterator[BaseModel]:
        """Yield the answer's chunks as tokens come.

        The receipt is in the finish chunk of a single choice, or in a chunk of its own after
        several; the usage, if asked for, comes last.
        """
        options = self.request.stream_options
        wants_usage = options is not None and options.include_usage
        # OpenAI sends a null usage with every chunk before the one that has it.
        common = {**self._common, "usage": None} if wants_usage else self._common
        async for index, delta in generation.deltas():
            self._note(index, delta)
            ends = delta.finish_reason is not None and self.n_choices == 1
            for choice, is_last in _marked_last(self._choice_chunks(index, delta)):
                extra = self._steering() if ends and is_last else {}
                yield self._chunk({**common, **extra, "choices": [choice]})
        async for choice in self._further():
            yield self._chunk({**common, "choices": [choice]})
        if self._receipt is not None and self.n_choices > 1:
            yield self._chunk({**common, **self._steering(), "choices": []})
        if wants_usage:
            yield self._chunk({**common, "choices": [], "usage": self._usage()})

    async def _further(self) -> AsyncIterator[BaseModel]:
        """Yield chunk choices that come after every choice has finished; by default none."""
        for nothing in list[BaseModel]():
            yield nothing

    def _note(self, index: int, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        # The choices of one prompt share it; the first one's cache hits count for the prompt.
        if index % self.request.n == 0:
            self._cached.setdefault(index, delta.cached_tokens)
        if self._receipt is not None:
            self._receipt.note(index, delta)

    def _probed(self, rows: list[ProbeRow]) -> dict[str, Any]:
        """Return a choice's extra field with what the probes read, or nothing."""
        return probe_readings(self._probes, rows)

    def _steering(self) -> dict[str, Any]:
        return {} if self._receipt is None else {"steering": self._receipt.body()}

    def _usage(self) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self.prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )

    def logged_facts(self, index: int) -> dict[str, Any]:
        """Return what the generation log holds of choice `index` beside its text, plain JSON."""
        return {
            **{key: self._common[key] for key in ("id", "created", "model")},
            "index": index,
            **self._asked(index),
            "metadata": self.request.metadata,
            "steering": None if self._receipt is None else self._receipt.short(),
        }

    @abc.abstractmethod
    def _asked(self, index: int) -> dict[str, Any]:
        """Return what choice `index` answers: `messages` or `prompt`, as the client wrote it."""

    @abc.abstractmethod
    def _collect(self, index: int, delta: Delta) -> None:
        """Take in a delta of a whole answer."""

    @abc.abstractmethod
    def _assembled(self, common: dict[str, Any]) -> BaseModel:
        """Return the whole answer."""

    @abc.abstractmethod
    def _choice_chunks(self, index: int, delta: Delta) -> Iterator[BaseModel]:
        """Yield the chunk choices one delta makes."""

    @abc.abstractmethod
    def _chunk(self, fields: dict[str, Any]) -> BaseModel:
        """Return one chunk."""


def stop_reason(delta: Delta) -> dict[str, Any]:
    """Return vLLM's extra field of a choice: the stop string or id that ended it, if one did."""
    return {} if delta.stop_reason is None else {"stop_reason": delta.stop_reason}


def _marked_last(items: Iterator[BaseModel]) -> Iterator[tuple[BaseModel, bool]]:
    listed = list(items)
    for i, item in enumerate(listed):
        yield item, i == len(listed) - 1

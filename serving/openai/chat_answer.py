"""The answers of POST /v1/chat/completions, in OpenAI's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from pydantic import BaseModel

from trimtab.serving.engines.base import Delta, TokenLogprobs
from trimtab.serving.openai.answer import Answer, stop_reason
from trimtab.serving.openai.chat_request import ChatRequest
from trimtab.serving.openai.logprob_format import chat_logprobs, prompt_logprobs
from trimtab.steering.plan import ProbeRow

Explain = Callable[[list[int]], Awaitable[dict[str, Any]]]
"""Returns the attribution of an answer's tokens, or its error, as it goes over the wire."""


class ChatAnswer(Answer):
    """Chat choices, whole or in chunks; see `Answer`.

    Args:
        explain: attributes each finished choice; None if nobody asked for it.
    """

    prefix = "chatcmpl"
    request: ChatRequest

    def __init__(self, *args: Any, explain: Explain | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._explain = explain
        self._ids: list[list[int]] = [[] for _ in range(self.n_choices)]
        self._attributions: dict[int, dict[str, Any]] = {}
        self._texts = [""] * self.n_choices
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.n_choices)]
        self._readings: list[list[ProbeRow]] = [[] for _ in range(self.n_choices)]
        self._last: dict[int, Delta] = {}
        self._prompt: list[Any] | None = None
        self._opened: set[int] = set()

    def _note(self, index: int, delta: Delta) -> None:
        super()._note(index, delta)
        self._ids[index].extend(delta.token_ids)

    async def _further(self) -> AsyncIterator[BaseModel]:
        if self._explain is None:
            return
        for i, ids in enumerate(self._ids):
            self._attributions[i] = await self._explain(ids)
            yield ChunkChoice(
                index=i,
                delta=ChoiceDelta(),
                logprobs=None,
                finish_reason=None,
                **self._attribution(i),
            )

    def _attribution(self, index: int) -> dict[str, Any]:
        found = self._attributions.get(index)
        return {} if found is None else {"attribution": found}

    def _asked(self, index: int) -> dict[str, Any]:
        turns = self.request.messages
        return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}

    def _collect(self, index: int, delta: Delta) -> None:
        self._texts[index] += delta.text
        self._logprobs[index].extend(delta.logprobs)
        self._readings[index].extend(delta.probes)
        if delta.finish_reason is not None:
            self._last[index] = delta
        if delta.prompt_logprobs is not None and self._prompt is None:
            top = self.request.prompt_logprobs or 0
            self._prompt = prompt_logprobs(delta.prompt_logprobs, top=top)

    def _assembled(self, common: dict[str, Any]) -> BaseModel:
        choices = []
        for i, text in enumerate(self._texts):
            last = self._last[i]
            assert last.finish_reason is not None  # what made it the last
            logprobs = None
            if self.request.logprobs:
                logprobs = ChoiceLogprobs(content=chat_logprobs(self._logprobs[i]), refusal=None)
            choices.append(
                Choice(
                    index=i,
                    message=ChatCompletionMessage(role="assistant", content=text, refusal=None),
                    logprobs=logprobs,
                    finish_reason=last.finish_reason.value,
                    **stop_reason(last),
                    **self._probed(self._readings[i]),
                    **self._attribution(i),
                )
            )
        # On the answer and not on a choice: the prompt is the same for all, and so vLLM has it.
        prompt = {} if self.request.prompt_logprobs is None else {"prompt_logprobs": self._prompt}
        return ChatCompletion(object="chat.completion", choices=choices, **common, **prompt)

    def _choice_chunks(self, index: int, delta: Delta) -> Iterator[BaseModel]:
        if index not in self._opened:
            self._opened.add(index)
            opening = ChoiceDelta(role="assistant", content="")
            yield ChunkChoice(index=index, delta=opening, logprobs=None, finish_reason=None)
        if delta.text or delta.logprobs or delta.probes:
            logprobs = None
            if self.request.logprobs:
                logprobs = ChunkLogprobs(content=chat_logprobs(delta.logprobs), refusal=None)
            piece = ChoiceDelta(content=delta.text)
            probed = self._probed(list(delta.probes))
            yield ChunkChoice(
                index=index, delta=piece, logprobs=logprobs, finish_reason=None, **probed
            )
        if delta.finish_reason is not None:
            yield ChunkChoice(
                index=index,
                delta=ChoiceDelta(),
                logprobs=None,
                finish_reason=delta.finish_reason.value,
                **stop_reason(delta),
            )

    def _chunk(self, fields: dict[str, Any]) -> BaseModel:
        return ChatCompletionChunk(object="chat.completion.chunk", **fields)

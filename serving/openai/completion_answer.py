"""The answers of POST /v1/completions, in OpenAI's own types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from trimtab.serving.engines.base import Delta, TokenLogprobs
from trimtab.serving.openai.answer import Answer, stop_reason
from trimtab.serving.openai.completion_request import CompletionRequest
from trimtab.serving.openai.logprob_format import completion_logprobs, prompt_logprobs
from trimtab.serving.state import ServerState
from trimtab.steering.plan import Plan, ProbeRow, Reader


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its text for an echo or the log, and its first token's text."""

    ids: tuple[int, ...]
    text: str
    first_token: str


@dataclass
class _Choice:
    text: str = ""
    offset: int = 0
    is_open: bool = False
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    readings: list[ProbeRow] = field(default_factory=list)
    prompt: list[Any] | None = None
    last: Delta | None = None


class CompletionAnswer(Answer):
    """Text choices, whole or in chunks; see `Answer`."""

    prefix = "cmpl"
    request: CompletionRequest

    def __init__(
        self,
        server: ServerState,
        request: CompletionRequest,
        *,
        plan: Plan | None,
        prompts: list[Prompt],
        probes: tuple[Reader, ...] = (),
    ) -> None:
        lengths = [len(prompt.ids) for prompt in prompts]
        super().__init__(server, request, plan=plan, prompt_lengths=lengths, probes=probes)
        self._prompts = prompts
        self._special_ids = frozenset(server.info.tokenizer.all_special_ids)
        self._choices = [_Choice() for _ in range(self.n_choices)]

    def _opened(self, index: int, delta: Delta) -> tuple[str, list[TokenLogprobs | None]]:
        """Return what a delta adds, with the echo before the first."""
        choice = self._choices[index]
        text, tokens = delta.text, list[TokenLogprobs | None](delta.logprobs)
        if not choice.is_open:
            choice.is_open = True
            if self.request.echo:
                text = self._prompt_of(index).text + text
                tokens = [*(delta.prompt_logprobs or ()), *tokens]
        return text, tokens

    def _prompt_of(self, index: int) -> Prompt:
        return self._prompts[index // self.request.n]

    def _asked(self, index: int) -> dict[str, Any]:
        return {"prompt": self._prompt_of(index).text}

    def _collect(self, index: int, delta: Delta) -> None:
        choice = self._choices[index]
        text, tokens = self._opened(index, delta)
        choice.text += text
        choice.logprobs.extend(tokens)
        choice.readings.extend(delta.probes)
        if delta.prompt_logprobs is not None and self.request.prompt_logprobs is not None:
            top = self.request.prompt_logprobs
            choice.prompt = prompt_logprobs(delta.prompt_logprobs, top=top)
        if delta.finish_reason is not None:
            choice.last = delta

    def _assembled(self, common: dict[str, Any]) -> BaseModel:
        choices = []
        for i, choice in enumerate(self._choices):
            assert choice.last is not None  # every choice has ended
            extra = {**stop_reason(choice.last), **self._probed(choice.readings)}
            if self.request.prompt_logprobs is not None:
                extra["prompt_logprobs"] = choice.prompt
            choices.append(
                self._choice(i, choice.text, tokens=choice.logprobs, last=choice.last, extra=extra)
            )
        return Completion(object="text_completion", choices=choices, **common)

    def _choice_chunks(self, index: int, delta: Delta) -> Iterator[BaseModel]:
        text, tokens = self._opened(index, delta)
        if text or tokens or delta.probes or delta.finish_reason is not None:
            extra = {**stop_reason(delta), **self._probed(list(delta.probes))}
            yield self._choice(index, text, tokens=tokens, last=delta, extra=extra)

    def _choice(
        self,
        index: int,
        text: str,
        *,
        tokens: list[TokenLogprobs | None],
        last: Delta,
        extra: dict[str, Any],
    ) -> BaseModel:
        logprobs: Logprobs | None = None
        top = self.request.logprobs
        if top is not None and tokens:
            logprobs, self._choices[index].offset = completion_logprobs(
                tokens,
                first_text=self._prompt_of(index).first_token,
                special_ids=self._special_ids,
                offset=self._choices[index].offset,
                top=top,
            )
        # Any and unchecked, because OpenAI's type denies the null finish reason that its API sends
        # in every chunk but the last.
        reason: Any = None if last.finish_reason is None else last.finish_reason.value
        return CompletionChoice.model_construct(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            **extra,
        )

    def _chunk(self, fields: dict[str, Any]) -> BaseModel:
        return Completion.model_construct(object="text_completion", **fields)

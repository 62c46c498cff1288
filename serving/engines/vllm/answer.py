"""One sequence's outputs from vLLM, turned into our deltas."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.serving.detokenizer import Detokenizer, TokenText
from trimtab.serving.engines.base import Delta, EngineError, FinishReason, Request, TokenLogprobs
from trimtab.serving.engines.vllm.reports import Inbox
from trimtab.serving.engines.vllm.sampling import token_logprobs
from trimtab.steering.step import SplitPromptError
from trimtab.steering.thinking import ThinkingMarks, ThinkingSpans


class SplitPromptFailure(EngineError):
    """The scheduler split a prompt that a gate needs whole; nothing was answered yet."""


class Answer:
    """Collects a sequence.

    Args:
        request: the request.
        inbox: where the workers' reports about it arrive.
        tokenizer: the model's.
        marks: its thinking marks.
        text: text of single tokens.
    """

    def __init__(
        self,
        request: Request,
        inbox: Inbox,
        tokenizer: Any,
        *,
        marks: ThinkingMarks | None,
        text: TokenText,
    ) -> None:
        self._request = request
        self._inbox = inbox
        self._text = text
        self._detokenizer = Detokenizer(tokenizer, stop=request.sampling.stop)
        self._spans = None if marks is None else ThinkingSpans(marks, request.prompt_ids)
        self._n_generated = 0
        self._is_first = True

    def delta(self, output: Any) -> Delta | None:
        """Return what an output adds; None if that is nothing.

        Raises:
            SplitPromptFailure: it may be tried again.
            EngineError: a worker gave up on it, or does not vouch for its steering.
        """
        found = output.outputs[0]
        if self._inbox.failure is not None or found.finish_reason == "error":
            raise self._failure(found)
        more: dict[str, Any] = {}
        if self._is_first:
            self._is_first = False
            more["cached_tokens"] = int(output.num_cached_tokens or 0)
            if self._request.sampling.prompt_logprobs is not None:
                more["prompt_logprobs"] = self._prompt_logprobs(output.prompt_logprobs)
        if self._request.sampling.max_tokens == 0:
            return Delta(finish_reason=FinishReason.LENGTH, steering=self._receipt(), **more)
        ids = list(found.token_ids)
        text, reason, stop_reason, kept = self._read(ids, found)
        self._inbox.counts_at(self._n_run)  # forgets those before
        ids = ids[:kept]
        if self._request.sampling.logprobs is not None and ids:
            more["logprobs"] = self._logprobs(ids, found.logprobs)
        if self._request.probes:
            rows, self._inbox.probes = (
                self._inbox.probes[:kept],
                self._inbox.probes[len(found.token_ids) :],
            )
            more["probes"] = tuple(tuple(map(tuple, row)) for row in rows)
        if reason is None and not ids and not more:
            return None
        return Delta(
            text=text,
            token_ids=tuple(ids),
            finish_reason=reason,
            stop_reason=stop_reason,
            steering=self._receipt() if reason is not None else None,
            **more,
        )

    def _read(
        self, ids: list[int], found: Any
    ) -> tuple[str, FinishReason | None, str | int | None, int]:
        """Return new text, why and by what it ended, and how many of the tokens count."""
        reason = None if found.finish_reason is None else _REASONS[found.finish_reason]
        stop_reason: str | int | None = None
        if self._is_own_stop(found.stop_reason):
            stop_reason = found.stop_reason
        text = ""
        for i, token in enumerate(ids):
            self._n_generated += 1
            if self._spans is not None:
                self._spans.push(token)
            if reason is FinishReason.STOP and i == len(ids) - 1:
                break  # the token that ends it has no text
            text += self._detokenizer.push(token)
            if self._detokenizer.stopped_by is not None:
                text += self._detokenizer.finish()
                return text, FinishReason.STOP, self._detokenizer.stopped_by, i + 1
        if reason is not None:
            text += self._detokenizer.finish()
            if self._detokenizer.stopped_by is not None:  # only in what was held back
                reason, stop_reason = FinishReason.STOP, self._detokenizer.stopped_by
        return text, reason, stop_reason, len(ids)

    def _is_own_stop(self, token: Any) -> bool:
        return isinstance(token, int) and token in self._request.sampling.stop_token_ids

    def _failure(self, found: Any) -> EngineError:
        why = self._inbox.failure or f"{found.stop_reason or 'vLLM gave up on it'}"
        if SplitPromptError.__name__ in why and self._n_generated == 0:
            return SplitPromptFailure(
                "The prompt was split over several passes again and again, and a gate needs it "
                "whole; try again when the server is less busy."
            )
        return EngineError(f"The engine failed on this request: {why}")

    def _receipt(self) -> dict[str, Any] | None:
        plan = self._request.plan
        if plan is None:
            return None
        counts = self._inbox.account(
            plan,
            n_prompt=len(self._request.prompt_ids),
            n_tokens=self._n_run,
            thinking=self._flags(self._n_run),
        )
        if counts is None:
            raise EngineError("The engine gave no account of the steering it was asked for.")
        return counts.receipt(plan)

    @property
    def _n_run(self) -> int:
        """Tokens that were run; the last one was chosen but not run."""
        return len(self._request.prompt_ids) + max(self._n_generated - 1, 0)

    def _flags(self, n_tokens: int) -> np.ndarray | None:
        return None if self._spans is None else self._spans.flags(0, n_tokens)

    def _logprobs(self, ids: list[int], found: Any) -> tuple[TokenLogprobs, ...]:
        top = self._request.sampling.logprobs or 0
        pairs = zip(ids, found, strict=False)
        return tuple(token_logprobs(d, token, top=top, text=self._text) for token, d in pairs)

    def _prompt_logprobs(self, found: Any) -> tuple[TokenLogprobs | None, ...]:
        top = self._request.sampling.prompt_logprobs or 0
        ids = self._request.prompt_ids
        return tuple(
            None if d is None else token_logprobs(d, token, top=top, text=self._text)
            for token, d in zip(ids, found or [None] * len(ids), strict=False)
        )


_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
    "repetition": FinishReason.STOP,
}

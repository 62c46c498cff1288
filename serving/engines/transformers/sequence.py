"""One running request: its tokens, its place in the cache and what it has said so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.serving.detokenizer import Detokenizer
from trimtab.serving.engines.base import Delta, FinishReason, Request, TokenLogprobs
from trimtab.serving.engines.transformers.runner import Chunk
from trimtab.serving.engines.transformers.sampler import SamplerState
from trimtab.steering.bank import Lease
from trimtab.steering.steered_request import SteeredRequest, counts_of
from trimtab.steering.step import Span, Watch
from trimtab.steering.thinking import ThinkingMarks, ThinkingSpans


@dataclass
class Sequence:
    """A request from admission to its end.

    Attributes:
        request: what was asked.
        emit: takes each delta; called on the engine's thread.
        detokenizer: turns its tokens into text.
        sampler: chooses its tokens.
        marks: the model's thinking marks, None if it has none.
        row: place in the cache while running.
        lease: its steering in the bank while running.
        watch: what its probes read, if it has any.
        done: tokens already in the cache.
    """

    request: Request
    emit: Callable[[Delta], None]
    detokenizer: Detokenizer
    sampler: SamplerState
    marks: ThinkingMarks | None = None
    row: int = -1
    lease: Lease | None = None
    steered: SteeredRequest | None = None
    watch: Watch | None = None
    done: int = 0
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    _spans: ThinkingSpans | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        if self.marks is not None:
            self._spans = ThinkingSpans(self.marks, self.ids)

    @property
    def n_prompt(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.request.prompt_ids)

    @property
    def n_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.ids) - self.n_prompt

    @property
    def is_decoding(self) -> bool:
        """True once the whole prompt is in the cache."""
        return self.done >= self.n_prompt

    def hold(self, row: int, lease: Lease | None) -> None:
        """Take a place in the batch."""
        self.row = row
        self.lease = lease
        if lease is not None:
            self.steered = SteeredRequest(lease, self.n_prompt)
        if self.request.probes:
            self.watch = Watch(self.request.probes)

    def chunk(self, budget: int) -> Chunk:
        """Return its next tokens to run, at most `budget` of them."""
        pending = self.ids[self.done : self.done + budget]
        n = len(pending)
        wants_all = self.request.sampling.prompt_logprobs is not None and not self.is_decoding
        reaches_end = self.done + n == len(self.ids)
        span = Span(n, self.done, self.steered, self._thinking(self.done, n), self.watch)
        return Chunk(
            row=self.row,
            ids=pending,
            start=self.done,
            span=span,
            n_logits=n if wants_all else int(reaches_end),
        )

    def accept(self, token_id: int) -> None:
        """Append a chosen token."""
        self.ids.append(token_id)
        self.sampler.record(token_id)
        if self._spans is not None:
            self._spans.push(token_id)

    def receipt(self) -> dict[str, Any] | None:
        """Return the runtime half of the steering receipt, None for an unsteered request."""
        plan = self.request.plan
        if plan is None:
            return None
        if self.steered is None:
            return counts_of(plan, n_prompt=self.n_prompt, n_tokens=0).receipt(plan)
        thinking = self._thinking(0, self.done)
        return self.steered.count(self.done, thinking).receipt(plan)

    def end(self, reason: FinishReason, *, text: str = "", **more: Any) -> None:
        """Send the last delta."""
        self.emit(Delta(text=text, finish_reason=reason, steering=self.receipt(), **more))

    def _thinking(self, start: int, n: int) -> np.ndarray | None:
        return None if self._spans is None else self._spans.flags(start, n)

"""One request in a vLLM worker: what it brought, what it holds, and what it has to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trimtab.serving.engines.vllm.plan_wire import Carried
from trimtab.steering.steered_request import Counts, SteeredRequest
from trimtab.steering.step import Span, Watch
from trimtab.steering.thinking import ThinkingMarks, ThinkingSpans

Tokens = Sequence[int]


@dataclass(frozen=True)
class BatchRow:
    """One request's tokens in a forward pass.

    Attributes:
        id: vLLM's id of the request.
        n_tokens: how many of its tokens are run.
        start: absolute position of the first.
        n_drafts: how many of the last are guesses that may be rejected.
        ids: the sequence so far, for thinking spans; None where the host does not know it.
    """

    id: str
    n_tokens: int
    start: int
    n_drafts: int = 0
    ids: Tokens | None = None


@dataclass(eq=False)
class LiveRequest:
    """A request that a worker steers or reads, from its admission to its end.

    Attributes:
        carried: what it brought.
        n_prompt: length of its prompt in tokens.
        request: its slots and gates; None until it first holds slots.
        watch: what its probes read; None without probes.
        thinking: its thinking spans, if its plan tells them apart.
        norms: |h| of its tokens by layer, if it measures.
        is_told: whether its first report has gone.
    """

    carried: Carried
    n_prompt: int
    request: SteeredRequest | None = None
    watch: Watch | None = None
    thinking: ThinkingSpans | None = None
    norms: dict[int, list[float]] = field(default_factory=dict)
    is_told: bool = False

    @property
    def has_to_tell(self) -> bool:
        is_read = self.watch is not None or self.carried.measures
        return is_read or self.has_gate or not self.is_told

    @classmethod
    def of(cls, carried: Carried, prompt_ids: Tokens) -> LiveRequest:
        """Return it as it begins."""
        live = cls(carried, len(prompt_ids))
        if carried.probes:
            live.watch = Watch(carried.probes)
        if carried.marks is not None:
            live.thinking = ThinkingSpans(ThinkingMarks(*carried.marks), prompt_ids)
        return live

    @cached_property
    def has_gate(self) -> bool:
        """True if a part of its plan is gated."""
        plan = self.carried.plan
        return plan is not None and any(part.gate is not None for part in plan.parts)

    def span(self, row: BatchRow) -> Span:
        """Return its tokens of a pass.

        Raises:
            RuntimeError: its plan depends on tokens that the host does not know.
        """
        thinking = None
        if self.thinking is not None:
            if row.ids is None:
                raise RuntimeError("the host does not know the tokens of this pass")
            for position in range(self.thinking.n_tokens, row.start + row.n_tokens):
                self.thinking.push(int(row.ids[position]))
            thinking = self.thinking.flags(row.start, row.n_tokens)
        return Span(row.n_tokens, row.start, self.request, thinking, self.watch)

    def report(self, row: BatchRow, n_sampled: int | None) -> dict[str, Any]:
        """Return what there is to tell after a pass; see `WorkerSteering.end`.

        Args:
            row: its tokens of the pass.
            n_sampled: tokens it got; None if the host does not know yet.
        """
        report: dict[str, Any] = {} if self.is_told else {"applied": True}
        self.is_told = True
        if self.has_gate and self.request is not None:
            first = row.start + row.n_tokens - row.n_drafts
            n_more = row.n_drafts if n_sampled is None else min(max(n_sampled - 1, 0), row.n_drafts)
            ends = range(first, first + 1 + n_more)
            report["counts"] = [[n, self._counts(n).packed()] for n in ends]
        if self.watch is not None:
            report["probes"] = [list(values) for values in self.watch.latest]
        return report

    def _counts(self, n_tokens: int) -> Counts:
        assert self.request is not None
        flags = None if self.thinking is None else self.thinking.flags(0, n_tokens)
        return self.request.count(n_tokens, flags)


def check_shapes(carried: Carried, *, n_layers: int, hidden_size: int) -> None:
    """Refuse what a bank would fail on halfway, or what no pass would ever reach.

    Raises:
        ValueError: layers past the model's, or tensors of another width.
    """
    readers = list(carried.probes)
    layers: set[int] = set()
    widths: set[int] = set()
    for part in carried.plan.parts if carried.plan is not None else ():
        layers.update(part.layers)
        if part.gate is not None:
            readers.append(part.gate.reader)
        for term in part.layers.values():
            readers += [guide.reader for guide in term.guides]
            tensors = (term.add, term.low_a, term.low_b)
            widths.update(t.shape[-1] for t in tensors if t is not None)
    layers.update(reader.layer for reader in readers)
    widths.update(reader.classifier.w_in.shape[1] for reader in readers)
    if not layers <= set(range(n_layers)):
        raise ValueError(f"layers {sorted(layers)} in a model of {n_layers}")
    if not widths <= {hidden_size}:
        raise ValueError(f"tensors {sorted(widths)} wide in a model of {hidden_size}")

"""One forward pass's steering: which token belongs to which slot, at which layers, gates included.

An engine describes its batch as spans, one a request; everything else is derived here. The same
step serves prefill chunks, decoding rows and whole sequences, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trimtab.kernels import is_fused, probabilities, read, shift, steer, steer_stream
from trimtab.steering.bank import Bank
from trimtab.steering.gate_work import Reading, decisions
from trimtab.steering.guidance_work import GuidanceWork, plan_guidance
from trimtab.steering.plan import MAX_PARTS, Gate, Reader
from trimtab.steering.steered_request import SteeredRequest

# Numbers of additive rows, gathered for all layers, that a step keeps for when it runs again.
_KEPT_CHANGES = 2**22


class SplitPromptError(ValueError):
    """A gate that reads the whole prompt got a part of it."""

    def __init__(self) -> None:
        super().__init__("a per-prompt gate needs the whole prompt in one forward pass")


@dataclass(eq=False)
class Watch:
    """What a request's probes read, steered or not.

    Attributes:
        readers: the probes.
        latest: probabilities of each one's labels at the last token run, in the readers' order.
    """

    readers: tuple[Reader, ...]
    latest: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.latest = [[] for _ in self.readers]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one request in a forward pass.

    Attributes:
        n_tokens: how many.
        start: absolute position of the first.
        request: its steering; None leaves the tokens alone.
        thinking: whether each token lies in a thinking span, `[n_tokens]`, bool; None means no.
        watch: probes that read its last token; None reads nothing.
    """

    n_tokens: int
    start: int = 0
    request: SteeredRequest | None = None
    thinking: np.ndarray | None = None
    watch: Watch | None = None

    @property
    def is_plain(self) -> bool:
        """True if its tokens are neither steered nor read."""
        return self.watch is None and (self.request is None or not self.request.lease.slots)

    @property
    def is_steady(self) -> bool:
        """True if as many of its request's next tokens would be steered the same way."""
        if self.watch is not None:
            return False
        request = self.request
        return request is None or (
            request.is_uniform or (request.is_uniform_answer and self.start >= request.n_prompt)
        )


@dataclass(frozen=True)
class _LayerWork:
    index: torch.Tensor | None  # tokens touched here, [n]; None means all
    tokens: np.ndarray | None  # the same on the host
    slots: torch.Tensor  # [n, n_parts]
    has_low_rank: bool
    has_norm: bool


@dataclass(frozen=True, eq=False)
class Shift:
    """All that happens at a layer where tokens only get rows added.

    Attributes:
        index: the tokens, `[n]`, int64; None means all.
        change: what each gets, `[n, d_model]`, float32.
        keeps_norm: whether |h| is restored, `[n, 1]`, bool, or one for all.
    """

    index: torch.Tensor | None
    change: torch.Tensor
    keeps_norm: torch.Tensor | bool

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the pass's hidden states with these tokens shifted, `[n_tokens, d_model]`."""
        states = hidden if self.index is None else hidden.index_select(0, self.index)
        moved = shift(states.float(), self.change, keeps_norm=self.keeps_norm).to(hidden.dtype)
        return moved if self.index is None else hidden.index_copy(0, self.index, moved)


@dataclass
class _Watched:
    reader: Reader
    tokens: list[int] = field(default_factory=list)
    into: list[tuple[Watch, int]] = field(default_factory=list)
    seen: torch.Tensor | None = None


class SteerStep:
    """The steering of one forward pass over `n_tokens` flattened tokens."""

    def __init__(self, bank: Bank, spans: Sequence[Span]) -> None:
        n_tokens = sum(span.n_tokens for span in spans)
        n_parts = max((len(s.request.lease.slots) for s in spans if s.request), default=0)
        # A fused op takes all tokens at every layer and finds out by itself whom to leave alone:
        # one copy of the slots a pass, and one kernel however many parts a request has.
        self._is_fused = is_fused(bank.device)
        if self._is_fused:
            n_parts = MAX_PARTS
        self.bank = bank
        self.n_tokens = n_tokens
        self._requests: list[tuple[slice, SteeredRequest]] = []
        self._readings: dict[int, list[Reading]] = {}
        self._watched: dict[int, dict[str, _Watched]] = {}
        self._slots = np.zeros((n_tokens, n_parts), dtype=np.int64)
        gates: np.ndarray | None = None
        at = 0
        for span in spans:
            tokens = slice(at, at + span.n_tokens)
            at += span.n_tokens
            request = span.request
            if span.watch is not None:
                self._watch(span.watch, at - 1)
            if request is None or not request.lease.slots:
                continue
            self._requests.append((tokens, request))
            for m, (part, slot) in enumerate(
                zip(request.lease.plan.parts, request.lease.slots, strict=True)
            ):
                if part.gate is None and part.window.everywhere:
                    self._slots[tokens, m] = slot
                    continue
                positions = np.arange(span.start, span.start + span.n_tokens)
                inside = part.window.select(
                    positions, n_prompt=request.n_prompt, thinking=span.thinking
                )
                self._slots[tokens, m] = np.where(inside, slot, 0)
                if part.gate is None:
                    continue
                if gates is None:
                    gates = np.ones((n_tokens, n_parts), dtype=np.float32)
                if m in request.latched:
                    gates[tokens, m] = request.latched[m]
                elif part.gate.per_prompt and any(r is request for _, r in self._requests[:-1]):
                    continue  # an earlier span of this pass is the prompt, and decides for all
                elif part.gate.per_prompt or inside.any():
                    self._read(part.gate, tokens, m, request, span)
        self._shifts: dict[int, Shift] = {}
        self._layers = self._plan_layers()
        self._guidance = self._plan_guidance()
        self._gates = None if gates is None else torch.from_numpy(gates).to(bank.device)
        self._decisions = {n: decisions(some, bank.device) for n, some in self._readings.items()}
        self.layers = frozenset({*self._layers, *self._guidance, *self._readings, *self._watched})

    def _read(
        self, gate: Gate, tokens: slice, part: int, request: SteeredRequest, span: Span
    ) -> None:
        if gate.per_prompt:
            if span.start != 0 or span.n_tokens < request.n_prompt:
                raise SplitPromptError
            tokens = slice(tokens.start, tokens.start + request.n_prompt)
        reading = Reading(gate, tokens, part, request, span.start)
        self._readings.setdefault(gate.layer, []).append(reading)

    def _watch(self, watch: Watch, token: int) -> None:
        for i, reader in enumerate(watch.readers):
            at_layer = self._watched.setdefault(reader.layer, {})
            watched = at_layer.setdefault(reader.digest, _Watched(reader))
            watched.tokens.append(token)
            watched.into.append((watch, i))

    def _plan_guidance(self) -> dict[int, list[GuidanceWork]]:
        if not self._requests:
            return {}
        spans = [(tokens, request.lease.slots) for tokens, request in self._requests]
        live = self.bank.has_guides[:, self._slots].any((1, 2))
        return {
            layer: plan_guidance(self.bank, layer, self._slots, spans)
            for layer in np.flatnonzero(live).tolist()
        }

    def _plan_layers(self) -> dict[int, _LayerWork]:
        bank, slots = self.bank, self._slots
        work: dict[int, _LayerWork] = {}
        touched = bank.touches[:, slots].any(-1)  # [n_layers, n_tokens]
        of_all = torch.from_numpy(slots).to(bank.device) if self._is_fused else None
        for layer in np.flatnonzero(touched.any(1)).tolist():
            tokens = np.flatnonzero(touched[layer])
            mine = slots[tokens]
            whole = len(tokens) == self.n_tokens
            if of_all is not None:
                work[layer] = _LayerWork(
                    index=None, tokens=None if whole else tokens, slots=of_all,
                    has_low_rank=True, has_norm=True,
                )  # fmt: skip
                continue
            work[layer] = _LayerWork(
                index=None if whole else torch.from_numpy(tokens).to(bank.device),
                tokens=None if whole else tokens,
                slots=torch.from_numpy(mine).to(bank.device),
                has_low_rank=bool(bank.has_low_rank[layer, mine].any()),
                has_norm=bool(bank.has_norm[layer, mine].any()),
            )
        return work

    def shift(self, layer: int) -> Shift | None:
        """Return what there is to do at a layer if it is only to add, else None."""
        if self._is_fused:
            return None  # it gathers and adds in one launch as it is
        known = self._shifts.get(layer)
        if known is not None:
            return known
        work = self._layers.get(layer)
        is_more = layer in self._guidance or layer in self._readings or layer in self._watched
        if work is None or is_more or work.has_low_rank or self._gates is not None:
            return None
        made = self._shift_of(layer, work)
        # Worth keeping while the same requests decode; a long prompt passes once.
        if self.n_tokens * self.bank.hidden_size * self.bank.n_layers <= _KEPT_CHANGES:
            self._shifts[layer] = made
        return made

    def _shift_of(self, layer: int, work: _LayerWork) -> Shift:
        n_tokens, n_parts = work.slots.shape
        rows = self.bank.row_of[layer].index_select(0, work.slots.reshape(-1))
        change = self.bank.rows.index_select(0, rows)
        if n_parts > 1:
            change = change.view(n_tokens, n_parts, -1).sum(1)
        keeps_norm: torch.Tensor | bool = work.has_norm
        if work.has_norm:
            mine = self._slots if work.tokens is None else self._slots[work.tokens]
            asked = self.bank.has_norm[layer, mine].any(1)
            if not asked.all():
                keeps_norm = torch.from_numpy(asked).to(self.bank.device).unsqueeze(1)
        return Shift(work.index, change, keeps_norm)

    def touched(self, layer: int) -> torch.Tensor | None:
        """Return the tokens that `apply` may change at a layer, `[n]`, int64; None means all."""
        indices = [work.index for work in self._guidance.get(layer, ())]
        if layer in self._layers:
            tokens = self._layers[layer].tokens
            known = None if tokens is None else torch.from_numpy(tokens).to(self.bank.device)
            indices.append(known)
        if any(index is None for index in indices):
            return None
        some = [index for index in indices if index is not None]
        if not some:
            return torch.zeros(0, dtype=torch.int64, device=self.bank.device)
        return some[0] if len(some) == 1 else torch.cat(some).unique()

    def apply(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return a layer's steered output; the input is not changed.

        Args:
            layer: decoder layer.
            hidden: its output, `[n_tokens, d_model]`.
        """
        if hidden.shape[0] != self.n_tokens:
            raise ValueError(f"step of {self.n_tokens} tokens got hidden {tuple(hidden.shape)}")
        only = self.shift(layer)
        if only is not None:
            return only.apply(hidden)
        self._read_layer(layer, hidden)
        if layer in self._layers:
            hidden = self._changed(layer, hidden)
        for work in self._guidance.get(layer, ()):
            hidden = work.apply(hidden, bank=self.bank, gates=self._gates)
        return hidden

    def steer_stream(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> bool:
        """Steer a layer's stream in place by one fused op, if that is all there is to do.

        Args:
            layer: decoder layer.
            hidden: `[n_tokens, d_model]`.
            residual: what is to be added to it to make the stream; None means nothing.

        Returns:
            False, with nothing done, where guidance changes the layer too, or the device has no
            fused op.
        """
        if not self._is_fused or layer in self._guidance:
            return False
        if layer in self._readings or layer in self._watched:
            self._read_layer(layer, hidden if residual is None else hidden.float() + residual)
        work = self._layers.get(layer)
        if work is not None:
            bank = self.bank.layer(layer)
            steer_stream(hidden, residual, work.slots, bank=bank, gates=self._gates)
        return True

    def _read_layer(self, layer: int, hidden: torch.Tensor) -> None:
        """Let gates decide and probes read."""
        for reading in self._readings.get(layer, ()):
            if reading.gate.per_prompt:
                self._decide(reading, hidden)
        for decision in self._decisions.get(layer, ()):
            network = self.bank.readers.of(decision.reader)
            decision.take(hidden, network, self._own_gates())
        for watched in self._watched.get(layer, {}).values():
            index = torch.tensor(watched.tokens, device=self.bank.device)
            network = self.bank.readers.of(watched.reader)
            watched.seen = probabilities(read(hidden[index], network), network)

    def _changed(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        work = self._layers[layer]
        gates = self._gates
        if gates is not None and work.index is not None:
            gates = gates[work.index]
        steered = steer(
            hidden if work.index is None else hidden[work.index],
            work.slots,
            bank=self.bank.layer(layer),
            gates=gates,
            has_low_rank=work.has_low_rank,
            has_norm=work.has_norm,
        )
        return steered if work.index is None else hidden.index_copy(0, work.index, steered)

    def _decide(self, reading: Reading, hidden: torch.Tensor) -> None:
        """Let a gate decide by its whole prompt; the one place where the host waits for a GPU."""
        gate = reading.gate
        states = hidden[reading.tokens]
        # The first position is an attention sink with a norm of its own; leave it out.
        states = (states[1:] if len(states) > 1 else states).float().mean(0, keepdim=True)
        network = self.bank.readers.of(gate.reader)
        score = probabilities(read(states, network), network)[:, gate.label]
        value = float(score > gate.threshold if gate.above else score < gate.threshold)
        reading.request.latched[reading.part] = value
        gates = self._own_gates()
        for tokens, request in self._requests:
            if request is reading.request:
                gates[tokens, reading.part] = value

    def _own_gates(self) -> torch.Tensor:
        assert self._gates is not None
        if torch.is_grad_enabled():
            self._gates = self._gates.clone()  # a layer before may have kept it for its gradient
        return self._gates

    def finish(self) -> None:
        """Tell each request what was steered and what its probes read, after the forward pass."""
        for watched in (w for at_layer in self._watched.values() for w in at_layer.values()):
            assert watched.seen is not None  # the pass went through the layer
            for (watch, i), row in zip(watched.into, watched.seen.tolist(), strict=True):
                watch.latest[i] = row
        # What decides by the whole prompt was latched when it was read.
        readings = [r for some in self._readings.values() for r in some if not r.gate.per_prompt]
        if not readings:
            return
        assert self._gates is not None
        gates = self._gates.cpu().numpy() > 0
        for reading in readings:
            inside = self._slots[reading.tokens, reading.part] > 0
            is_open = gates[reading.tokens, reading.part]
            reading.request.saw(reading.part, reading.start, inside, is_open)

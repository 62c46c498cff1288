"""One request's steering while it runs: its slots, and what its gates have decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.steering.bank import Lease
from trimtab.steering.plan import Plan

_SHUT, _OPEN = 1, 2  # what a gate was seen to be at a token; 0 where it was never read


@dataclass(eq=False)
class SteeredRequest:
    """A request's lease with what its gates have decided so far.

    Counts are made from positions, not by adding up passes, so that they are the same whatever
    was run twice (a preempted request's tokens, rejected drafts) or not at all (a cached prompt).

    Attributes:
        lease: its slots.
        n_prompt: length of its prompt in tokens.
        latched: decision of each per-prompt gate, by part index.
        is_uniform: whether every token is treated alike.
        is_uniform_answer: whether every generated token is.
    """

    lease: Lease
    n_prompt: int
    latched: dict[int, float] = field(default_factory=dict)
    is_uniform: bool = field(init=False)
    is_uniform_answer: bool = field(init=False)
    _seen: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = self.lease.plan.parts
        has_gate = any(part.gate is not None for part in parts)
        self.is_uniform = not has_gate and all(part.window.everywhere for part in parts)
        self.is_uniform_answer = not has_gate and all(part.window.same_in_answer for part in parts)

    def saw(self, part: int, start: int, inside: np.ndarray, is_open: np.ndarray) -> None:
        """Note a token gate's decisions.

        Args:
            part: index of the gated part.
            start: absolute position of the first token.
            inside: whether each token is in the part's window, `[n]`, bool.
            is_open: whether the gate was open there, `[n]`, bool.
        """
        stop = start + len(inside)
        seen = self._seen.get(part)
        if seen is None or len(seen) < stop:
            grown = np.zeros(2 * stop, dtype=np.int8)
            if seen is not None:
                grown[: len(seen)] = seen
            seen = self._seen[part] = grown
        seen[start:stop] = np.where(inside, np.where(is_open, _OPEN, _SHUT), 0)

    def count(self, n_tokens: int, thinking: np.ndarray | None = None) -> Counts:
        """Return what has been steered among the first `n_tokens` positions.

        Args:
            n_tokens: how many tokens of the sequence have been run.
            thinking: whether each lies in a thinking span, `[n_tokens]`, bool; None means no.
        """
        return counts_of(
            self.lease.plan,
            n_prompt=self.n_prompt,
            n_tokens=n_tokens,
            thinking=thinking,
            latched=self.latched,
            seen=self._seen,
        )


@dataclass(frozen=True)
class Counts:
    """Tokens of one request, counted.

    Attributes:
        n_steered: changed by some part: inside its window and its gate open.
        n_inside: of each part, inside its window (and, with a token gate, read).
        n_open: of those, the ones at which its gate was open.
        latched: decision of each per-prompt gate that has been taken, by part index.
    """

    n_steered: int
    n_inside: tuple[int, ...]
    n_open: tuple[int, ...]
    latched: dict[int, float]

    def packed(self) -> list[Any]:
        """Return them as plain values."""
        latched = [[part, value] for part, value in self.latched.items()]
        return [self.n_steered, list(self.n_inside), list(self.n_open), latched]

    @classmethod
    def unpacked(cls, values: list[Any]) -> Counts:
        """Return what `packed` packed."""
        n_steered, n_inside, n_open, latched = values
        return cls(n_steered, tuple(n_inside), tuple(n_open), dict(map(tuple, latched)))

    def receipt(self, plan: Plan) -> dict[str, Any]:
        """Return the runtime half of a steering receipt: tokens steered, gates fired."""
        gates = []
        for i, part in enumerate(plan.parts):
            if part.gate is None:
                continue
            fired: bool | float
            if part.gate.per_prompt:
                fired = bool(self.latched.get(i))
            else:
                fired = round(self.n_open[i] / self.n_inside[i], 4) if self.n_inside[i] else 0.0
            gates.append({"probe": part.gate.probe, "layer": part.gate.layer, "fired": fired})
        return {"steered_tokens": self.n_steered, "gates": gates}


def counts_of(
    plan: Plan,
    *,
    n_prompt: int,
    n_tokens: int,
    thinking: np.ndarray | None = None,
    latched: dict[int, float] | None = None,
    seen: dict[int, np.ndarray] | None = None,
) -> Counts:
    """Return what a plan has steered among a sequence's first `n_tokens` positions.

    Args:
        plan: the request's.
        n_prompt: length of its prompt in tokens.
        n_tokens: tokens run.
        thinking: whether each lies in a thinking span, `[n_tokens]`, bool; None means no.
        latched: decisions of per-prompt gates, by part index; a gate not in it is shut.
        seen: of each part with a token gate, 0 unread, 1 shut or 2 open at each position.
    """
    latched, seen = latched or {}, seen or {}
    positions = np.arange(n_tokens)
    steered = np.zeros(n_tokens, dtype=bool)
    n_inside, n_open = [], []
    for i, part in enumerate(plan.parts):
        inside = part.window.select(positions, n_prompt=n_prompt, thinking=thinking)
        opened = inside
        if part.gate is not None and part.gate.per_prompt:
            opened = inside & (latched.get(i, 0.0) > 0)
        elif part.gate is not None:
            read = np.zeros(n_tokens, dtype=np.int8)
            known = seen.get(i, read)[:n_tokens]
            read[: len(known)] = known
            inside, opened = read > 0, read == _OPEN
        n_inside.append(int(inside.sum()))
        n_open.append(int(opened.sum()))
        steered |= opened
    return Counts(int(steered.sum()), tuple(n_inside), tuple(n_open), dict(latched))

"""What a request's spec compiles to: engine-independent rows, gates and a dose report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.steering.window import Window

MAX_PARTS = 4
MAX_RANK = 8


@dataclass(frozen=True, eq=False)
class Gate:
    """A probe that opens or shuts a part.

    Attributes:
        probe: id of the artifact read.
        layer: layer whose output is read, at or before the first layer the part changes.
        direction: unit direction, `[hidden_size]`, float32.
        slope, intercept: probability = sigmoid(slope * (h . direction) + intercept).
        threshold: probability at which it switches.
        above: open above the threshold if True, below it if False.
        per_prompt: decide once from the prompt's mean hidden state, not at every token.
    """

    probe: str
    layer: int
    direction: torch.Tensor
    slope: float
    intercept: float
    threshold: float
    above: bool
    per_prompt: bool

    @property
    def digest(self) -> str:
        """SHA-256 of everything the gate reads."""
        scalars = [self.layer, self.slope, self.intercept, self.threshold, self.above]
        h = hashlib.sha256(json.dumps([*scalars, self.per_prompt]).encode())
        h.update(self.direction.numpy().tobytes())
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class LayerTerm:
    """One part's change at one layer: h + add - low_a^T (low_b h), then the norm if asked.

    Attributes:
        add: `[hidden_size]`, float32, or None.
        low_a, low_b: `[rank, hidden_size]`, float32, or None.
        normalize: keep the hidden state's norm.
    """

    add: torch.Tensor | None
    low_a: torch.Tensor | None
    low_b: torch.Tensor | None
    normalize: bool


@dataclass(frozen=True, eq=False)
class Part:
    """The terms of a plan that share their tokens and gate: one slot of the bank."""

    window: Window
    gate: Gate | None
    layers: dict[int, LayerTerm]
    digest: str

    @classmethod
    def of(cls, window: Window, gate: Gate | None, layers: dict[int, LayerTerm]) -> Part:
        """Return a part with the digest of everything it does."""
        h = hashlib.sha256(repr((window, None if gate is None else gate.digest)).encode())
        for layer, term in layers.items():
            h.update(repr((layer, term.normalize)).encode())
            for tensor in (term.add, term.low_a, term.low_b):
                h.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
        return cls(window, gate, layers, h.hexdigest())


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled spec.

    Attributes:
        parts: what to do; empty when every term has scale 0.
        fingerprint: SHA-256 of everything that changes hidden states, for caches.
        prompt_fingerprint: the same for what touches prompt tokens; None if nothing does, so
            that such a plan may share the prompt's cache with unsteered requests.
        report: the receipt's static half: terms applied, layers and relative doses, plain JSON.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    prompt_fingerprint: str | None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_whole_prompt(self) -> bool:
        """True if the prompt must be prefilled in one piece (a gate reads its mean)."""
        return any(part.gate is not None and part.gate.per_prompt for part in self.parts)

    @property
    def receipt(self) -> dict[str, Any]:
        """What is applied, as it goes over the wire: the report under a short fingerprint."""
        return {"fingerprint": self.fingerprint[:16], **self.report}


def additive_plan(rows: dict[int, torch.Tensor], *, normalize: bool = False) -> Plan:
    """Return a plan that adds one row a layer to every token, without a store or limits.

    Builders and calibration use it; requests go through `compile_plan`.

    Args:
        rows: layer -> `[hidden_size]`, float32.
        normalize: keep the hidden states' norms.
    """
    layers = {n: LayerTerm(row.float(), None, None, normalize) for n, row in rows.items()}
    parts = (Part.of(Window(), None, layers),) if layers else ()
    fingerprint = fingerprint_of(parts)
    return Plan(parts, fingerprint, fingerprint if parts else None)


def fingerprint_of(parts: tuple[Part, ...]) -> str:
    """Return SHA-256 of what parts do together, whatever their order."""
    return hashlib.sha256("".join(sorted(part.digest for part in parts)).encode()).hexdigest()

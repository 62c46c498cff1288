"""What a request's spec compiles to: engine-independent rows, gates and a dose report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.kernels import Classifier
from trimtab.kernels.guidance import Loss, Step
from trimtab.steering.window import Window

MAX_PARTS = 4
MAX_RANK = 8


@dataclass(frozen=True, eq=False)
class Reader:
    """A stored vector's or classifier's network at the layer it reads.

    Attributes:
        id: the artifact's.
        layer: layer whose output is read, before that layer's own steering.
        classifier: the network.
        labels: its labels; a vector has one, its own id.
        digest: SHA-256 of the artifact and the layer, equal for equal networks.
    """

    id: str
    layer: int
    classifier: Classifier
    labels: tuple[str, ...]
    digest: str


ProbeRow = tuple[tuple[float, ...], ...]
"""What readers read at one token: for each its labels' probabilities."""


@dataclass(frozen=True, eq=False)
class Gate:
    """A probability that opens or shuts a part.

    Attributes:
        probe: what the request called it, `id` or `id/label`.
        reader: read at or before the first layer the part changes.
        label: which of its labels.
        threshold: probability at which it switches.
        above: open above the threshold if True, below it if False.
        per_prompt: decide once from the prompt's mean hidden state, not at every token.
    """

    probe: str
    reader: Reader
    label: int
    threshold: float
    above: bool
    per_prompt: bool

    @property
    def layer(self) -> int:
        """Layer whose output is read."""
        return self.reader.layer

    @property
    def digest(self) -> str:
        """SHA-256 of everything the gate reads."""
        parts = [self.reader.digest, self.label, self.threshold, self.above, self.per_prompt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Guide:
    """Steps down one classifier's gradient at one layer; see `kernels.guidance.guide`.

    Attributes:
        reader: the classifier and its layer.
        toward: numbers of the labels to steer toward.
        away: numbers of the labels to steer away from.
        sizes: length of each step, at most `spec.MAX_STEPS`; of a reflection the share turned.
        loss: whose gradient.
        step: how a size becomes a step.
        picks_rival: avoid the likeliest label outside `toward` as well.
        until: stop where the labels are this likely; None never stops.
        keeps_norm: restore |h| afterwards.
    """

    reader: Reader
    toward: tuple[int, ...]
    away: tuple[int, ...]
    sizes: tuple[float, ...]
    loss: Loss = "logits"
    step: Step = "unit"
    picks_rival: bool = False
    until: float | None = None
    keeps_norm: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of everything the guide does."""
        labels = [sorted(self.toward), sorted(self.away), self.picks_rival, self.until]
        steps = [self.sizes, self.loss, self.step, self.keeps_norm]
        parts = [self.reader.digest, *labels, *steps]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class LayerTerm:
    """One part's change at one layer: h + add - low_a^T (low_b h), the norm if asked, guidance.

    Attributes:
        add: `[hidden_size]`, float32, or None.
        low_a, low_b: `[rank, hidden_size]`, float32, or None.
        normalize: keep the hidden state's norm.
        guides: guidance, one after the other, on what the rest has made.
    """

    add: torch.Tensor | None = None
    low_a: torch.Tensor | None = None
    low_b: torch.Tensor | None = None
    normalize: bool = False
    guides: tuple[Guide, ...] = ()

    @property
    def has_change(self) -> bool:
        """True if there is more than guidance."""
        return self.add is not None or self.low_a is not None


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
            guides = [guide.digest for guide in term.guides]
            h.update(repr((layer, term.normalize, guides)).encode())
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


def plan_of(layers: dict[int, LayerTerm]) -> Plan:
    """Return a plan that acts on every token, without a store or limits.

    Builders and calibration use it; requests go through `compile_plan`.
    """
    parts = (Part.of(Window(), None, layers),) if layers else ()
    fingerprint = fingerprint_of(parts)
    return Plan(parts, fingerprint, fingerprint if parts else None)


def additive_plan(rows: dict[int, torch.Tensor], *, normalize: bool = False) -> Plan:
    """Return a plan that adds one row a layer to every token; see `plan_of`.

    Args:
        rows: layer -> `[hidden_size]`, float32.
        normalize: keep the hidden states' norms.
    """
    return plan_of({n: LayerTerm(add=row.float(), normalize=normalize) for n, row in rows.items()})


def fingerprint_of(parts: tuple[Part, ...]) -> str:
    """Return SHA-256 of what parts do together, whatever their order."""
    return hashlib.sha256("".join(sorted(part.digest for part in parts)).encode()).hexdigest()

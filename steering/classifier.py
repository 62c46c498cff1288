"""A classifier of hidden states as a file: what guidance follows, and what probes read."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from trimtab.kernels import Classifier
from trimtab.steering.artifact import ModelRef, complete_header, layers_problem, packed, unpacked
from trimtab.steering.errors import ArtifactError
from trimtab.steering.spec import LABEL_PATTERN

MAX_LABELS = 64
MAX_WIDTH = 1024
_LABEL = re.compile(LABEL_PATTERN)
_TENSORS = ("w_in", "b_in", "w_mid", "b_mid", "w_out", "b_out")


@dataclass(frozen=True)
class SafeDose:
    """The largest dose of a label set at which generations stayed coherent.

    Attributes:
        target: labels steered toward, sorted.
        avoid: labels steered away from, sorted.
        picks_rival: whether the likeliest other label was avoided as well.
        is_reflection: whether steps were reflections, whose dose is the share turned.
        dose: sum of the steps' lengths relative to the layer's typical |h|, at each layer.
    """

    target: tuple[str, ...]
    avoid: tuple[str, ...]
    picks_rival: bool
    is_reflection: bool
    dose: float


@dataclass(frozen=True, eq=False)
class ClassifierArtifact:
    """A classifier of hidden states at one or more layers.

    Inputs are raw hidden states: what standardised them is folded into the first layer, and what
    calibrated the probabilities into the last.

    Attributes:
        id: name, unique in a store.
        model: the model whose hidden states it reads.
        layers: 0-based decoder layers it can read, ascending; one network each.
        labels: their names, in the order of the logits.
        is_exclusive: one label a text (softmax) or any number of them (sigmoid).
        w_in, b_in: `[n_layers, d_in, hidden_size]`, `[n_layers, d_in]`, float32.
        w_mid, b_mid: `[n_layers, d_mid, d_in]`, `[n_layers, d_mid]`; None if it is linear.
        w_out, b_out: `[n_layers, n_labels, d_mid]`, `[n_layers, n_labels]`; None if it is linear.
        default_layers: layers guided when a request names none.
        probe_layer: layer that tells held-out texts apart best, read by probes and gates.
        doses: what calibration allows, for the default layers; empty if it was left out.
        settings: training options, plain JSON.
        data: name, hash and counts of the data, plain JSON.
        metrics: held-out measures a layer, plain JSON, keyed by the layer's number as text.
        calibration: how the doses were found, plain JSON; None if left out.
        description: a sentence for people.
        created: ISO 8601 time, UTC.
        trimtab_version: version that wrote it.
    """

    id: str
    model: ModelRef
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    is_exclusive: bool
    w_in: torch.Tensor
    b_in: torch.Tensor
    default_layers: tuple[int, ...]
    probe_layer: int
    w_mid: torch.Tensor | None = None
    b_mid: torch.Tensor | None = None
    w_out: torch.Tensor | None = None
    b_out: torch.Tensor | None = None
    doses: tuple[SafeDose, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    description: str = ""
    created: str = ""
    trimtab_version: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ArtifactError(f"Classifier {self.id!r} is not valid: {problem}.")

    def _problem(self) -> str | None:
        problem = layers_problem(self.layers, self.default_layers, self.model)
        if problem:
            return problem
        if self.probe_layer not in self.layers:
            return f"its probe layer {self.probe_layer} is not among its layers"
        if not 1 <= len(self.labels) <= MAX_LABELS or len(set(self.labels)) != len(self.labels):
            return f"it has {len(self.labels)} labels; 1 to {MAX_LABELS} different ones are allowed"
        for label in self.labels:
            if not _LABEL.fullmatch(label):
                return f"its label {label[:80]!r} is not letters, digits, ' ', '.', '_' and '-'"
        if self.is_exclusive and len(self.labels) == 1:
            return "labels that exclude one another are at least two"
        return self._shape_problem() or self._dose_problem()

    def _shape_problem(self) -> str | None:
        head = (self.w_mid, self.b_mid, self.w_out, self.b_out)
        if any(part is None for part in head) and any(part is not None for part in head):
            return "it has some tensors of a hidden layer and not all"
        n, d_in = len(self.layers), self.b_in.shape[-1] if self.b_in.ndim else 0
        shapes = {"w_in": (n, d_in, self.model.hidden_size), "b_in": (n, d_in)}
        if self.b_mid is None:
            if d_in != len(self.labels):
                return f"it has {d_in} rows for {len(self.labels)} labels"
        else:
            d_mid = self.b_mid.shape[-1] if self.b_mid.ndim else 0
            shapes["w_mid"], shapes["b_mid"] = (n, d_mid, d_in), (n, d_mid)
            shapes["w_out"] = (n, len(self.labels), d_mid)
            shapes["b_out"] = (n, len(self.labels))
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                return f"its {name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}"
            if max(shape[1:-1], default=0) > MAX_WIDTH or 0 in shape:
                return f"its {name} is {shape}; hidden layers have 1 to {MAX_WIDTH} units"
            if not torch.isfinite(tensor).all():
                return f"its {name} holds NaN or infinity"
        return None

    def _dose_problem(self) -> str | None:
        for entry in self.doses:
            named = {*entry.target, *entry.avoid}
            if not named <= set(self.labels):
                return f"a dose names labels it has not, {sorted(named - set(self.labels))}"
            if not 0 <= entry.dose < float("inf"):
                return f"a dose is {entry.dose}"
        return None

    @functools.cached_property
    def _classifiers(self) -> dict[int, Classifier]:
        found = {}
        for i, layer in enumerate(self.layers):
            parts = [getattr(self, name) for name in _TENSORS]
            rows = [part[i] for part in parts if part is not None]
            pairs = list(zip(rows[0::2], rows[1::2], strict=True))
            found[layer] = Classifier.of(pairs, is_exclusive=self.is_exclusive)
        return found

    def at(self, layer: int) -> Classifier:
        """Return the network that reads a layer; the same object each time."""
        return self._classifiers[layer]

    def safe_dose(
        self,
        target: tuple[str, ...],
        avoid: tuple[str, ...],
        *,
        picks_rival: bool = False,
        is_reflection: bool = False,
    ) -> tuple[float, bool] | None:
        """Return the calibrated dose of a label set and whether it was measured for just that set.

        A set that was not measured gets the smallest dose of those that were.

        Returns:
            (dose, is measured), or None if nothing of the kind was calibrated.
        """
        kind = [entry for entry in self.doses if entry.is_reflection == is_reflection]
        wanted = (tuple(sorted(target)), tuple(sorted(avoid)), picks_rival)
        for entry in kind:
            if (entry.target, entry.avoid, entry.picks_rival) == wanted:
                return entry.dose, True
        return (min(entry.dose for entry in kind), False) if kind else None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what steering reads: layers, labels, weights, doses. Not the names."""
        read = [self.layers, self.default_layers, self.probe_layer, self.labels, self.is_exclusive]
        h = hashlib.sha256(json.dumps([*read, [asdict(d) for d in self.doses]]).encode())
        for name in _TENSORS:
            tensor = getattr(self, name)
            h.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
        return h.hexdigest()

    def renamed(self, new_id: str) -> ClassifierArtifact:
        """Return the same classifier under another id."""
        return replace(self, id=new_id)

    def facts(self) -> dict[str, Any]:
        """Return everything but the tensors, plain JSON."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        facts["model"] = self.model.facts()
        facts["doses"] = [asdict(entry) for entry in self.doses]
        return facts

    def card(self) -> dict[str, Any]:
        """Return the facts with the network's shape and digest, plain JSON."""
        hidden = [] if self.b_mid is None else [self.b_in.shape[1], self.b_mid.shape[1]]
        return {**self.facts(), "hidden_units": hidden, "digest": self.digest}


def to_bytes(classifier: ClassifierArtifact) -> bytes:
    """Return the artifact as a safetensors file's bytes."""
    parts = {name: getattr(classifier, name) for name in _TENSORS}
    tensors = {name: part for name, part in parts.items() if part is not None}
    return packed("classifier", classifier.facts(), tensors)


def from_bytes(data: bytes, *, name: str) -> ClassifierArtifact:
    """Read an artifact from a safetensors file's bytes.

    Args:
        data: the whole file.
        name: what to call it in errors (a file name or an id).

    Raises:
        ArtifactError: not safetensors, cut short, not ours, a newer format, or inconsistent.
    """
    header, tensors = unpacked("classifier", data, needed=("w_in", "b_in"), name=name)
    with complete_header(name):
        return ClassifierArtifact(
            id=str(header["id"]),
            model=ModelRef(**header["model"]),
            layers=tuple(int(x) for x in header["layers"]),
            labels=tuple(str(x) for x in header["labels"]),
            is_exclusive=bool(header["is_exclusive"]),
            default_layers=tuple(int(x) for x in header["default_layers"]),
            probe_layer=int(header["probe_layer"]),
            doses=tuple(_dose(entry) for entry in header["doses"]),
            settings=dict(header["settings"]),
            data=dict(header["data"]),
            metrics=dict(header["metrics"]),
            calibration=header["calibration"],
            description=str(header["description"]),
            created=str(header["created"]),
            trimtab_version=str(header["trimtab_version"]),
            **{tensor: tensors.get(tensor) for tensor in _TENSORS},  # type: ignore[arg-type]
        )


def _dose(entry: dict[str, Any]) -> SafeDose:
    return SafeDose(
        target=tuple(str(x) for x in entry["target"]),
        avoid=tuple(str(x) for x in entry["avoid"]),
        picks_rival=bool(entry["picks_rival"]),
        is_reflection=bool(entry["is_reflection"]),
        dose=float(entry["dose"]),
    )

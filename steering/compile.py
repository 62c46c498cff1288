"""Compile a request's spec for one model, refusing whatever could not be honoured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trimtab.kernels import Classifier
from trimtab.steering.artifact import ModelRef
from trimtab.steering.dose import dose_at, open_together
from trimtab.steering.errors import DoseError, SpecError
from trimtab.steering.plan import (
    MAX_PARTS,
    MAX_RANK,
    Gate,
    LayerTerm,
    Part,
    Plan,
    Reader,
    fingerprint_of,
)
from trimtab.steering.spec import AblateTerm, SteeringSpec, VectorTerm, When
from trimtab.steering.vector import VectorArtifact
from trimtab.steering.window import Window


class VectorSource(Protocol):
    """Where `compile_plan` finds vectors; `Store` is one."""

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        """Return a vector by id or raise NotFoundError."""
        ...


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        max_dose: largest relative dose |change| / |h| at one layer; None allows any.
        thinking: whether the model marks thinking spans, so `apply.thinking` can be honoured.
    """

    max_dose: float | None = 1.0
    thinking: bool = True


def compile_plan(
    spec: SteeringSpec,
    source: VectorSource,
    *,
    model: ModelRef,
    hidden_norms: torch.Tensor,
    limits: Limits,
    path: str = "steering",
) -> Plan:
    """Compile a spec for one model.

    Args:
        spec: the validated request.
        source: where ids are looked up.
        model: the served model; vectors of another are refused.
        hidden_norms: typical |h| at the output of each layer, `[n_layers]`, float32.
        limits: the server's limits.
        path: JSON path of the spec in the request, for errors.

    Raises:
        NotFoundError: an unknown id.
        SpecError: another model's vector, wrong width, a layer out of range, a gate read too
            late, terms that cannot be combined.
        DoseError: the relative dose at a layer is over `limits.max_dose`.
    """
    builder = _Builder(source, model=model, hidden_norms=hidden_norms, limits=limits)
    for i, term in enumerate(spec.vectors):
        builder.add(term, default_when=spec.when, path=f"{path}.vectors[{i}]", root=path)
    for i, ablation in enumerate(spec.ablate):
        builder.ablate(ablation, default_when=spec.when, path=f"{path}.ablate[{i}]", root=path)
    return builder.finish(path)


@dataclass
class _Draft:
    window: Window
    gate: Gate | None
    gate_path: str = ""
    add: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    normalize: dict[int, bool] = field(default_factory=dict)
    ablations: dict[int, list[tuple[torch.Tensor, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @property
    def touched(self) -> set[int]:
        return set(self.add) | set(self.ablations)


class _Builder:
    def __init__(
        self,
        source: VectorSource,
        *,
        model: ModelRef,
        hidden_norms: torch.Tensor,
        limits: Limits,
    ) -> None:
        self.source = source
        self.model = model
        self.norms = hidden_norms
        self.limits = limits
        self.drafts: dict[tuple[Window, str | None], _Draft] = {}
        self.applied: list[dict[str, Any]] = []
        # What each term adds at a layer, to name the largest when their sum is too much.
        self.shares: dict[int, list[tuple[float, str, float]]] = defaultdict(list)

    # --- terms

    def add(self, term: VectorTerm, *, default_when: When | None, path: str, root: str) -> None:
        vector = self._vector(term.id, path=path)
        layers = self._layers(term.layers, vector, vector.default_layers, path=path)
        draft = self._draft(term, default_when, path=path, root=root)
        normalize = vector.normalize if term.normalize is None else term.normalize
        doses = {}
        for layer in layers:
            change = vector.row(layer) * term.scale
            if not torch.isfinite(change).all():
                raise SpecError(
                    f"{path}.scale {term.scale} overflows the vector.", param=f"{path}.scale"
                )
            doses[layer] = float(change.double().norm()) / float(self.norms[layer])
            if term.scale == 0.0:
                continue
            if draft.normalize.setdefault(layer, normalize) != normalize:
                raise SpecError(
                    f"{path}.normalize is {normalize} but another term on layer {layer} with the "
                    "same tokens says otherwise; norm preservation holds for their sum.",
                    param=f"{path}.normalize",
                )
            draft.add[layer].append(change)
            self.shares[layer].append((doses[layer], f"{path}.scale", term.scale))
        self._note("vector", term, vector, layers, doses=doses, normalize=normalize)

    def ablate(self, term: AblateTerm, *, default_when: When | None, path: str, root: str) -> None:
        vector = self._vector(term.id, path=path)
        layers = self._layers(term.layers, vector, vector.layers, path=path)
        draft = self._draft(term, default_when, path=path, root=root)
        if term.scale < 0 or term.scale > 2:
            raise SpecError(
                f"{path}.scale is {term.scale}; an ablation takes 0 (nothing) to 2 (reflection).",
                param=f"{path}.scale",
            )
        for layer in layers:
            row = vector.row(layer)
            length = float(row.norm())
            if length == 0.0:
                raise SpecError(
                    f"{path}: vector {term.id!r} is zero at layer {layer}; choose other layers.",
                    param=f"{path}.layers",
                )
            if term.scale:
                entry = (row / length, term.scale, term.to * length)
                draft.ablations[layer].append(entry)
                dose = abs(term.scale * term.to) * length / float(self.norms[layer])
                self.shares[layer].append((dose, f"{path}.to", term.to))
                if len(draft.ablations[layer]) > MAX_RANK:
                    raise SpecError(
                        f"{path}: more than {MAX_RANK} ablations on layer {layer}.", param=path
                    )
        self._note("ablation", term, vector, layers, to=term.to)

    def _vector(self, name: str, *, path: str) -> VectorArtifact:
        vector = self.source.vector(name, param=f"{path}.id")
        check_belongs(vector.model, self.model, name=name, param=f"{path}.id")
        return vector

    def _layers(
        self,
        asked: list[int] | None,
        vector: VectorArtifact,
        default: tuple[int, ...],
        *,
        path: str,
    ) -> tuple[int, ...]:
        n = len(self.norms)
        if asked is None:
            # A GGUF file does not say how many layers its model had.
            if default[-1] >= n:
                raise SpecError(
                    f"{path}: vector {vector.id!r} has a direction for layer {default[-1]}; the "
                    f"model has layers 0 to {n - 1}. Name the layers to use in `layers`.",
                    param=f"{path}.layers",
                )
            return default
        for i, layer in enumerate(asked):
            if not 0 <= layer < n:
                raise SpecError(
                    f"{path}.layers[{i}] is {layer}; the model has layers 0 to {n - 1}.",
                    param=f"{path}.layers[{i}]",
                )
            if layer not in vector.layers:
                raise SpecError(
                    f"{path}.layers[{i}] is {layer}, where {vector.id!r} has no direction; it has "
                    f"{', '.join(map(str, vector.layers))}.",
                    param=f"{path}.layers[{i}]",
                )
        if len(set(asked)) != len(asked):
            raise SpecError(f"{path}.layers names a layer twice.", param=f"{path}.layers")
        return tuple(sorted(asked))

    def _draft(
        self,
        term: VectorTerm | AblateTerm,
        default_when: When | None,
        *,
        path: str,
        root: str,
    ) -> _Draft:
        window = Window.of(term.apply)
        if window.empty:
            raise SpecError(
                f"{path}.apply selects no token; nothing would be steered.", param=f"{path}.apply"
            )
        if term.apply.thinking is not None and not self.limits.thinking:
            raise SpecError(
                f"{path}.apply.thinking: this model marks no thinking span; leave the field out.",
                param=f"{path}.apply.thinking",
            )
        when, where = (
            (term.when, f"{path}.when") if term.when is not None else (default_when, f"{root}.when")
        )
        gate = None if when is None else self._gate(when, path=where)
        key = (window, None if gate is None else gate.digest)
        if key not in self.drafts:
            if len(self.drafts) == MAX_PARTS:
                raise SpecError(
                    f"{path} would need more than {MAX_PARTS} different combinations of `apply` "
                    "and `when` in one request.",
                    param=path,
                )
            self.drafts[key] = _Draft(window, gate, where)
        return self.drafts[key]

    def _gate(self, when: When, *, path: str) -> Gate:
        vector = self.source.vector(when.probe, param=f"{path}.probe")
        check_belongs(vector.model, self.model, name=when.probe, param=f"{path}.probe")
        if vector.probe is None or vector.probe_layer is None:
            raise SpecError(
                f"{path}.probe: vector {when.probe!r} carries no fitted probe (an imported vector "
                "has none); build it with `trimtab vectors build`.",
                param=f"{path}.probe",
            )
        layer = vector.probe_layer if when.layer is None else when.layer
        if layer not in vector.layers:
            raise SpecError(
                f"{path}.layer is {layer}; {when.probe!r} has {listed_layers(vector.layers)}.",
                param=f"{path}.layer",
            )
        slope, intercept = (float(x) for x in vector.probe[vector.layers.index(layer)])
        row = vector.row(layer)
        if not row.any():
            raise SpecError(
                f"{path}.layer: {when.probe!r} is zero at layer {layer} and reads nothing there; "
                "choose another layer.",
                param=f"{path}.layer",
            )
        threshold = when.above if when.above is not None else when.below
        assert threshold is not None  # the spec has exactly one
        unit = row / row.norm()
        network = Classifier.of(
            [(slope * unit.unsqueeze(0), torch.tensor([intercept]))], is_exclusive=False
        )
        reader = Reader(when.probe, layer, network, (when.probe,), f"{vector.digest}@{layer}")
        return Gate(
            probe=when.probe,
            reader=reader,
            label=0,
            threshold=threshold,
            above=when.above is not None,
            per_prompt=when.per == "prompt",
        )

    # --- the whole

    def _note(
        self,
        kind: str,
        term: VectorTerm | AblateTerm,
        vector: VectorArtifact,
        layers: tuple[int, ...],
        *,
        doses: dict[int, float] | None = None,
        **more: Any,
    ) -> None:
        entry: dict[str, Any] = {
            "kind": kind,
            "id": term.id,
            "scale": term.scale,
            "layers": list(layers),
            "digest": vector.digest[:16],
            **more,
        }
        if doses is not None:
            entry["dose"] = {str(layer): round(dose, 6) for layer, dose in doses.items()}
        self.applied.append(entry)

    def finish(self, path: str) -> Plan:
        parts = tuple(
            part for draft in self.drafts.values() if (part := _part(draft, path)) is not None
        )
        for layer, term in ((k, t) for part in parts for k, t in part.layers.items()):
            if term.add is not None and not torch.isfinite(term.add).all():
                raise SpecError(f"{path}: the terms' sum overflows at layer {layer}.", param=path)
        layers = sorted({layer for part in parts for layer in part.layers})
        together = open_together(parts)
        doses = {layer: dose_at(parts, layer, self.norms, together) for layer in layers}
        self._check_dose(doses)
        touching_prompt = tuple(part for part in parts if part.window.prompt)
        return Plan(
            parts=parts,
            fingerprint=fingerprint_of(parts),
            prompt_fingerprint=fingerprint_of(touching_prompt) if touching_prompt else None,
            report={
                "applied": self.applied,
                "layers": layers,
                "dose": {str(layer): round(dose, 6) for layer, dose in doses.items()},
            },
        )

    def _check_dose(self, doses: dict[int, float]) -> None:
        limit = self.limits.max_dose
        for layer, dose in doses.items():
            if limit is not None and not dose <= limit:
                _, param, value = max(self.shares[layer])
                raise DoseError(
                    f"{param} {value:g} brings the relative dose |change| / |h| at layer {layer} "
                    f"to {dose:.2f}; this server allows {limit:.2f}. Lower it, or start the "
                    "server with a higher --max-dose.",
                    param=param,
                )


def _part(draft: _Draft, path: str) -> Part | None:
    layers: dict[int, LayerTerm] = {}
    for layer in sorted(draft.touched):
        # In a fixed order, so that reordered terms round alike and share a fingerprint.
        changes = [row.double() for row in sorted(draft.add.get(layer, []), key=_bytes)]
        low_a = low_b = None
        if draft.ablations[layer]:
            entries = sorted(draft.ablations[layer], key=lambda x: (_bytes(x[0]), x[1], x[2]))
            units, shares, targets = (list(x) for x in zip(*entries, strict=True))
            basis = torch.stack(units)  # [rank, hidden_size]
            # The pseudo-inverse makes several full ablations remove the whole span, also when
            # the directions are not orthogonal; for one direction it is the direction itself.
            # Directions closer than 1e-4 count as one: float32 could not tell them apart.
            dual = torch.linalg.pinv(basis.double(), rtol=1e-4).T
            low_b = dual.float().contiguous()
            share = torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
            low_a = (basis * share).float()
            # Along the dual, so that no target moves the component along another direction.
            target = torch.tensor(targets, dtype=torch.float64).unsqueeze(1)
            offset = (dual * share * target).sum(0)
            if bool(offset.any()):
                changes.append(offset)
        add = torch.stack(changes).sum(0).float() if changes else None
        layers[layer] = LayerTerm(add, low_a, low_b, draft.normalize.get(layer, False))
    if not layers:
        return None
    gate = draft.gate
    if gate is not None and gate.layer > min(layers):
        where = draft.gate_path or f"{path}.when"
        raise SpecError(
            f"{where} reads layer {gate.layer}, after layer {min(layers)} which it should "
            "gate; set `when.layer` to an earlier layer or steer later layers.",
            param=where,
        )
    return Part.of(draft.window, gate, layers)


def _bytes(row: torch.Tensor) -> bytes:
    return row.contiguous().numpy().tobytes()


def check_belongs(own: ModelRef, served: ModelRef, *, name: str, param: str | None) -> None:
    """Refuse an artifact of another model.

    Raises:
        SpecError: width, layer count, architecture or fingerprint differ; the message says which.
    """
    if own.hidden_size != served.hidden_size:
        raise SpecError(
            f"Vector {name!r} has width {own.hidden_size}, the model {served.id!r} has "
            f"{served.hidden_size}: it was built for {own.id!r}.",
            param=param,
        )
    if own.fingerprint is not None and own.fingerprint != served.fingerprint:
        raise SpecError(
            f"Vector {name!r} was built for another model, {own.id!r}; this is {served.id!r}. "
            "Build it again with `trimtab vectors build`.",
            param=param,
        )
    if own.n_layers is not None and own.n_layers != served.n_layers:
        raise SpecError(
            f"Vector {name!r} was built for a model of {own.n_layers} layers, {own.id!r}; "
            f"{served.id!r} has {served.n_layers}.",
            param=param,
        )
    if own.model_type != served.model_type:
        raise SpecError(
            f"Vector {name!r} was built for a {own.model_type!r} model; {served.id!r} is a "
            f"{served.model_type!r}.",
            param=param,
        )


def listed_layers(layers: tuple[int, ...]) -> str:
    """Return layers for a message: "layers 0, 1, 2"."""
    return "layers " + ", ".join(map(str, layers))

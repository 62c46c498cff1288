"""Compile a request's spec for one model, refusing whatever could not be honoured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.dose import dose_at, open_together
from trimtab.steering.draft import Draft
from trimtab.steering.errors import DoseError, SpecError
from trimtab.steering.guidance import Guidance
from trimtab.steering.lookup import ArtifactSource, Lookup
from trimtab.steering.plan import MAX_PARTS, MAX_RANK, Plan, fingerprint_of
from trimtab.steering.spec import AblateTerm, GuidanceTerm, SteeringSpec, VectorTerm, When
from trimtab.steering.vector import VectorArtifact
from trimtab.steering.window import Window


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
    source: ArtifactSource,
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
        DoseError: the relative dose at a layer is over `limits.max_dose`, or guidance is over what
            its classifier was calibrated for.
    """
    builder = _Builder(source, model=model, hidden_norms=hidden_norms, limits=limits)
    for i, term in enumerate(spec.vectors):
        builder.add(term, default_when=spec.when, path=f"{path}.vectors[{i}]", root=path)
    for i, ablation in enumerate(spec.ablate):
        builder.ablate(ablation, default_when=spec.when, path=f"{path}.ablate[{i}]", root=path)
    for i, guidance in enumerate(spec.guidance):
        builder.guide(guidance, default_when=spec.when, path=f"{path}.guidance[{i}]", root=path)
    return builder.finish(path)


class _Builder:
    def __init__(
        self,
        source: ArtifactSource,
        *,
        model: ModelRef,
        hidden_norms: torch.Tensor,
        limits: Limits,
    ) -> None:
        self.lookup = Lookup(source, model, len(hidden_norms))
        self.norms = hidden_norms
        self.limits = limits
        self.drafts: dict[tuple[Window, str | None], Draft] = {}
        self.applied: list[dict[str, Any]] = []
        # What each term adds at a layer, to name the largest when their sum is too much.
        self.shares: dict[int, list[tuple[float, str, float]]] = defaultdict(list)
        # Guidance by one classifier at one layer, in shares of its calibrated dose: naming it
        # twice must not allow twice as much.
        self.followed: dict[tuple[str, int], float] = {}

    # --- terms

    def add(self, term: VectorTerm, *, default_when: When | None, path: str, root: str) -> None:
        vector = self.lookup.vector(term.id, param=f"{path}.id")
        layers = self.lookup.layers(term.layers, vector, vector.default_layers, path=path)
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
        vector = self.lookup.vector(term.id, param=f"{path}.id")
        layers = self.lookup.layers(term.layers, vector, vector.layers, path=path)
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

    def guide(self, term: GuidanceTerm, *, default_when: When | None, path: str, root: str) -> None:
        artifact = self.lookup.classifier(term.classifier, param=f"{path}.classifier")
        layers = self.lookup.layers(term.layers, artifact, artifact.default_layers, path=path)
        draft = self._draft(term, default_when, path=path, root=root)
        guidance = Guidance.of(term, artifact, layers, path=path)
        for layer in layers if guidance.dose else ():
            draft.guides[layer].append(guidance.guide(layer, float(self.norms[layer])))
            if not term.reflect:
                share = guidance.dose, guidance.param, guidance.given
                self.shares[layer].append(share)
            key = artifact.id, layer
            self.followed[key] = self.followed.get(key, 0.0) + guidance.share_of_safe
            if self.followed[key] > 1 + 1e-6 and not term.over_dose:
                guidance.refuse_over(self.followed[key], layer)
        self._apply(guidance.receipt(), artifact.model)

    def _draft(
        self,
        term: VectorTerm | AblateTerm | GuidanceTerm,
        default_when: When | None,
        *,
        path: str,
        root: str,
    ) -> Draft:
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
        gate = None if when is None else self.lookup.gate(when, path=where)
        key = (window, None if gate is None else gate.digest)
        if key not in self.drafts:
            if len(self.drafts) == MAX_PARTS:
                raise SpecError(
                    f"{path} would need more than {MAX_PARTS} different combinations of `apply` "
                    "and `when` in one request.",
                    param=path,
                )
            self.drafts[key] = Draft(window, gate, where)
        return self.drafts[key]

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
        self._apply(entry, vector.model)

    def _apply(self, entry: dict[str, Any], built_for: ModelRef) -> None:
        """Put a term on the receipt, with what it was measured on if that is not what is served."""
        elsewhere = built_for.measured_elsewhere(self.lookup.model)
        if elsewhere is not None:
            entry["calibrated_on"] = elsewhere
            entry["served_on"] = self.lookup.model.weights
        self.applied.append(entry)

    def finish(self, path: str) -> Plan:
        parts = tuple(
            part for draft in self.drafts.values() if (part := draft.part(path)) is not None
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
                    "server with a higher --max-dose (vLLM's own: TRIMTAB_MAX_DOSE).",
                    param=param,
                )

"""A request's guidance term made exact: which labels, how far, in which steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.errors import DoseError
from trimtab.steering.lookup import label_number, reader_at
from trimtab.steering.plan import Guide
from trimtab.steering.spec import GuidanceTerm


@dataclass(frozen=True)
class Guidance:
    """A term with its artifact and its dose.

    Attributes:
        term: what the request says.
        artifact: the classifier.
        layers: where it acts.
        path: JSON path of the term.
        dose: the steps' summed length relative to |h|, at each layer; of a reflection the shares
            turned, summed.
        safe: the calibrated dose, and whether it was measured for just these labels; None if
            there is none for these layers.
    """

    term: GuidanceTerm
    artifact: ClassifierArtifact
    layers: tuple[int, ...]
    path: str
    dose: float
    safe: tuple[float, bool] | None

    @classmethod
    def of(
        cls, term: GuidanceTerm, artifact: ClassifierArtifact, layers: tuple[int, ...], *, path: str
    ) -> Guidance:
        """Return the term with its dose.

        Args:
            term: what the request says.
            artifact: the classifier it names.
            layers: where it acts.
            path: JSON path of the term, for errors.

        Raises:
            SpecError: a label the classifier does not have.
            DoseError: no calibrated dose is known here and the term does not say `over_dose`.
        """
        for kind in ("target", "avoid"):
            for i, label in enumerate(getattr(term, kind)):
                param = f"{path}.{kind}[{i}]"
                label_number(artifact.labels, label, name=artifact.id, param=param)
        safe = artifact.safe_dose(
            tuple(term.target),
            tuple(term.avoid),
            picks_rival=term.avoid_rival,
            is_reflection=term.reflect,
        )
        if safe is not None and not set(layers) <= set(artifact.default_layers):
            safe = None
        if safe is None and (term.dose is None or (term.dose > 0 and not term.over_dose)):
            raise DoseError(
                f"{path}: how much of this classifier {artifact.id!r} the model bears was never "
                f"calibrated for {'reflections' if term.reflect else 'these layers'}. Calibrate it "
                "(`trimtab classifiers calibrate`), or give `dose` and `over_dose` true.",
                param=path if term.dose is None else f"{path}.dose",
            )
        if term.dose is not None:
            dose = term.dose
        else:
            assert safe is not None  # refused above
            dose = term.scale * safe[0]
        return cls(term, artifact, layers, path, dose, safe)

    @property
    def param(self) -> str:
        """JSON path of the field that sets the dose."""
        return f"{self.path}.{'scale' if self.term.dose is None else 'dose'}"

    @property
    def given(self) -> float:
        """That field's value."""
        return self.term.scale if self.term.dose is None else self.term.dose

    @property
    def share_of_safe(self) -> float:
        """The dose in units of the calibrated one; 0 where none is known."""
        if self.safe is None or self.dose == 0:
            return 0.0
        return self.dose / self.safe[0] if self.safe[0] else float("inf")

    def refuse_over(self, share: float, layer: int) -> NoReturn:
        """Refuse a dose past the calibrated one.

        Raises:
            DoseError: always.
        """
        assert self.safe is not None
        raise DoseError(
            f"{self.param} {self.given:g} brings guidance by {self.artifact.id!r} at layer "
            f"{layer} to {share:.2f} times the calibrated dose, {self.safe[0]:.3f} of |h|; past "
            "that, text falls apart quickly. Lower it, or give `over_dose` true.",
            param=self.param,
        )

    def guide(self, layer: int, norm: float) -> Guide:
        """Return what to do at a layer.

        Args:
            layer: which.
            norm: typical |h| there.
        """
        term, labels = self.term, self.artifact.labels
        whole = self.dose if term.reflect else self.dose * norm
        return Guide(
            reader=reader_at(self.artifact, layer),
            toward=tuple(sorted(labels.index(label) for label in term.target)),
            away=tuple(sorted(labels.index(label) for label in term.avoid)),
            sizes=steps_of(whole, n_steps=term.steps, decay=term.decay),
            loss=term.loss,
            step="reflect" if term.reflect else "unit",
            picks_rival=term.avoid_rival,
            until=term.until,
            keeps_norm=term.normalize,
        )

    def receipt(self) -> dict[str, Any]:
        """Return the term as the receipt has it, plain JSON."""
        term = self.term
        entry: dict[str, Any] = {
            "kind": "reflection" if term.reflect else "guidance",
            "id": self.artifact.id,
            "target": list(term.target),
            "avoid": list(term.avoid),
            "avoid_rival": term.avoid_rival,
            "scale": round(self.share_of_safe, 6) if self.safe is not None else None,
            "layers": list(self.layers),
            "digest": self.artifact.digest[:16],
            "steps": term.steps,
            "decay": term.decay,
            "loss": term.loss,
            "dose": {str(layer): round(self.dose, 6) for layer in self.layers},
            "calibrated_dose": None if self.safe is None else round(self.safe[0], 6),
            "calibrated_for_these_labels": self.safe is not None and self.safe[1],
        }
        if term.until is not None:
            entry["until"] = term.until
        if term.over_dose:
            entry["over_dose"] = True
        return entry


def steps_of(whole: float, *, n_steps: int, decay: float) -> tuple[float, ...]:
    """Return the sizes of steps that share a length, each `decay` times the one before."""
    weights = [decay**k for k in range(n_steps)]
    return tuple(whole * weight / sum(weights) for weight in weights)

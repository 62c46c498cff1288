"""A steering vector as a file."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from trimtab.steering.artifact import ModelRef, complete_header, layers_problem, packed, unpacked
from trimtab.steering.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class VectorArtifact:
    """One named steering vector: a direction a layer, with how it came to be.

    Attributes:
        id: name, unique in a store.
        model: the model it belongs to.
        layers: 0-based decoder layers it has a direction for, ascending.
        directions: `[len(layers), hidden_size]`, float32; scale 1.0 adds exactly these rows.
        default_layers: layers used when a request names none.
        method: registry name of the builder, or `gguf`.
        settings: the builder's options, plain JSON.
        data: name, hash and counts of the data it was built on, plain JSON.
        probe: `[len(layers), 2]`, float32, slope and intercept of the calibrated probability
            sigmoid(slope * (h . unit direction) + intercept); None if never fitted.
        probe_layer: layer whose probe separates held-out data best; None without a probe.
        normalize: whether requests keep the hidden norm when they do not say.
        calibration: the sweep's curve and what was chosen from it, plain JSON; None if skipped.
        description: a sentence for people.
        created: ISO 8601 time, UTC.
        trimtab_version: version that wrote it.
    """

    id: str
    model: ModelRef
    layers: tuple[int, ...]
    directions: torch.Tensor
    default_layers: tuple[int, ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    probe: torch.Tensor | None = None
    probe_layer: int | None = None
    normalize: bool = False
    calibration: dict[str, Any] | None = None
    description: str = ""
    created: str = ""
    trimtab_version: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ArtifactError(f"Vector {self.id!r} is not valid: {problem}.")

    def _problem(self) -> str | None:
        problem = layers_problem(self.layers, self.default_layers, self.model)
        if problem:
            return problem
        n, width = len(self.layers), self.model.hidden_size
        if self.directions.dtype != torch.float32 or tuple(self.directions.shape) != (n, width):
            return (
                f"its directions are {self.directions.dtype} {tuple(self.directions.shape)}, "
                f"expected float32 {(n, width)}"
            )
        if not torch.isfinite(self.directions).all():
            return "its directions hold NaN or infinity"
        if self.probe is not None:
            if self.probe.dtype != torch.float32 or tuple(self.probe.shape) != (n, 2):
                return "its probe is not a float32 table of slope and intercept per layer"
            if not torch.isfinite(self.probe).all():
                return "its probe holds NaN or infinity"
            if self.probe_layer not in self.layers:
                return f"its probe layer {self.probe_layer} is not among its layers"
        return None

    def row(self, layer: int) -> torch.Tensor:
        """Return the calibrated direction at a layer, `[hidden_size]`, float32."""
        return self.directions[self.layers.index(layer)]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what steering reads: layers, directions, probe, defaults. Not the names."""
        read = [self.layers, self.default_layers, self.probe_layer, self.normalize]
        h = hashlib.sha256(json.dumps(read).encode())
        h.update(self.directions.contiguous().numpy().tobytes())
        if self.probe is not None:
            h.update(self.probe.contiguous().numpy().tobytes())
        return h.hexdigest()

    def renamed(self, new_id: str) -> VectorArtifact:
        """Return the same vector under another id."""
        return replace(self, id=new_id)

    def card(self) -> dict[str, Any]:
        """Return everything but the tensors, plain JSON."""
        card = {
            key: value
            for key, value in asdict(replace(self, probe=None)).items()
            if key not in ("directions", "probe")
        }
        card["has_probe"] = self.probe is not None
        card["norms"] = [round(float(x), 4) for x in self.directions.norm(dim=1)]
        card["digest"] = self.digest
        return card


def to_bytes(vector: VectorArtifact) -> bytes:
    """Return the artifact as a safetensors file's bytes."""
    tensors = {"directions": vector.directions}
    if vector.probe is not None:
        tensors["probe"] = vector.probe
    facts = asdict(replace(vector, probe=None)) | {"model": vector.model.facts()}
    return packed("vector", facts, tensors)


def from_bytes(data: bytes, *, name: str) -> VectorArtifact:
    """Read an artifact from a safetensors file's bytes.

    Args:
        data: the whole file.
        name: what to call it in errors (a file name or an id).

    Raises:
        ArtifactError: not safetensors, cut short, not ours, a newer format, or inconsistent.
    """
    header, tensors = unpacked("vector", data, needed=("directions",), name=name)
    with complete_header(name):
        return VectorArtifact(
            id=str(header["id"]),
            model=ModelRef(**header["model"]),
            layers=tuple(int(x) for x in header["layers"]),
            directions=tensors["directions"],
            default_layers=tuple(int(x) for x in header["default_layers"]),
            method=str(header["method"]),
            settings=dict(header["settings"]),
            data=dict(header["data"]),
            probe=tensors.get("probe"),
            probe_layer=header["probe_layer"],
            normalize=bool(header["normalize"]),
            calibration=header["calibration"],
            description=str(header["description"]),
            created=str(header["created"]),
            trimtab_version=str(header["trimtab_version"]),
        )

"""Named vectors, classifiers and presets on disk, one folder a model, every write atomic."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trimtab.steering import classifier, vector
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.shelf import Shelf, check_id, write_atomically
from trimtab.steering.spec import SteeringSpec, parse_spec
from trimtab.steering.vector import VectorArtifact

__all__ = ["Store", "check_id", "model_folder", "write_atomically"]


def model_folder(home: Path, model_id: str) -> Path:
    """Return the folder that holds one model's artifacts."""
    return home / "models" / (re.sub(r"[^A-Za-z0-9._-]+", "--", model_id).strip("-.") or "model")


class Store:
    """One model's vectors, classifiers and presets, kept in memory and on disk; see `Shelf`.

    Names are unique within a kind: a vector and a classifier may share one.

    Args:
        folder: the model's folder, see `model_folder`. Made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._vectors = Shelf(
            folder / "vectors",
            suffix=".safetensors",
            read=_read_vector,
            write=vector.to_bytes,
            hint=" Build one with `trimtab vectors build`.",
        )
        self._classifiers = Shelf(
            folder / "classifiers",
            suffix=".safetensors",
            read=_read_classifier,
            write=classifier.to_bytes,
            hint=" Train one with `trimtab classifiers train`.",
        )
        self._presets = Shelf(
            folder / "presets", suffix=".json", read=_read_preset, write=_written_preset
        )

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with files that cannot be read, by their path in the store's folder."""
        shelves = (self._vectors, self._classifiers, self._presets)
        return {path: why for shelf in shelves for path, why in shelf.problems().items()}

    def refresh(self) -> None:
        """Read what has changed on disk. A file that cannot be read lands in `problems`."""
        for shelf in (self._vectors, self._classifiers, self._presets):
            shelf.refresh()

    # --- vectors

    def vectors(self) -> list[VectorArtifact]:
        """Return all readable vectors, by id."""
        return list(self._vectors.all().values())

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        """Return a vector by id.

        Raises:
            NotFoundError: unknown id, with the nearest known one; or its file is damaged.
        """
        return self._vectors.get(name, param=param)

    def has_vector(self, name: str) -> bool:
        """Return whether a vector of that id is stored, readable or not."""
        return self._vectors.has(name)

    def put_vector(self, vector: VectorArtifact) -> bool:
        """Store a vector, replacing one of the same id. Return True if the id was new."""
        return self._vectors.put(vector.id, vector)

    def delete_vector(self, name: str) -> None:
        """Remove a vector. Requests that run already keep their own copy.

        Raises:
            NotFoundError: unknown id.
        """
        self._vectors.delete(name)

    # --- classifiers

    def classifiers(self) -> list[ClassifierArtifact]:
        """Return all readable classifiers, by id."""
        return list(self._classifiers.all().values())

    def classifier(self, name: str, *, param: str | None = None) -> ClassifierArtifact:
        """Return a classifier by id.

        Raises:
            NotFoundError: unknown id, with the nearest known one; or its file is damaged.
        """
        return self._classifiers.get(name, param=param)

    def has_classifier(self, name: str) -> bool:
        """Return whether a classifier of that id is stored, readable or not."""
        return self._classifiers.has(name)

    def put_classifier(self, classifier: ClassifierArtifact) -> bool:
        """Store a classifier, replacing one of the same id. Return True if the id was new."""
        return self._classifiers.put(classifier.id, classifier)

    def delete_classifier(self, name: str) -> None:
        """Remove a classifier. Requests that run already keep their own copy.

        Raises:
            NotFoundError: unknown id.
        """
        self._classifiers.delete(name)

    # --- presets

    def presets(self) -> dict[str, SteeringSpec]:
        """Return all presets by name."""
        return self._presets.all()

    def preset(self, name: str, *, param: str | None = None) -> SteeringSpec:
        """Return a preset by name.

        Raises:
            NotFoundError: unknown name, with the nearest known one; or its file is damaged.
        """
        return self._presets.get(name, param=param)

    def put_preset(self, name: str, spec: SteeringSpec) -> bool:
        """Store a preset. Return True if the name was new."""
        return self._presets.put(name, spec)

    def delete_preset(self, name: str) -> None:
        """Remove a preset.

        Raises:
            NotFoundError: unknown name.
        """
        self._presets.delete(name)


def _read_vector(data: bytes, name: str) -> VectorArtifact:
    return vector.from_bytes(data, name=f"{name}.safetensors").renamed(name)


def _read_classifier(data: bytes, name: str) -> ClassifierArtifact:
    return classifier.from_bytes(data, name=f"{name}.safetensors").renamed(name)


def _read_preset(data: bytes, name: str) -> SteeringSpec:
    return parse_spec(json.loads(data.decode("utf-8")), path=f"presets.{name}")


def _written_preset(spec: SteeringSpec) -> bytes:
    body = spec.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(body, indent=1).encode()

"""Named vectors and presets on disk, one folder a model, every write atomic."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from trimtab.steering.artifact import MAX_ARTIFACT_BYTES
from trimtab.steering.errors import ArtifactError, NotFoundError, TrimtabError, did_you_mean, listed
from trimtab.steering.spec import ID_PATTERN, SteeringSpec, parse_spec
from trimtab.steering.vector import VectorArtifact, from_bytes, to_bytes

_ID = re.compile(ID_PATTERN)
_SUFFIX = {"vectors": ".safetensors", "presets": ".json"}
MAX_ENTRIES = 4096
_STALE_S = 3600.0


def check_id(name: str, *, param: str | None = None) -> str:
    """Return the id if it may name an artifact.

    Raises:
        ArtifactError: it could be mistaken for a path, or is too long.
    """
    if not _ID.fullmatch(name) or ".." in name:
        raise ArtifactError(
            f"{name[:80]!r} is not a valid id: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 64 characters.",
            param=param,
        )
    return name


def model_folder(home: Path, model_id: str) -> Path:
    """Return the folder that holds one model's artifacts."""
    return home / "models" / (re.sub(r"[^A-Za-z0-9._-]+", "--", model_id).strip("-.") or "model")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a restart after a crash, sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    # The inode tells two files of one size apart that were written within one clock tick.
    return status.st_mtime_ns, status.st_size, status.st_ino


class Store:
    """One model's vectors and presets, kept in memory and on disk.

    Safe to use from several threads. A file that another process wrote, replaced or removed is
    noticed at the next read of its name.

    Args:
        folder: the model's folder, see `model_folder`. Made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}
        self._lock = threading.RLock()
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self._vectors: dict[str, VectorArtifact] = {}
        self._presets: dict[str, SteeringSpec] = {}
        self._sweep()
        self.refresh()

    def _sweep(self) -> None:
        """Remove what a killed writer left behind, once nobody can still be writing it."""
        for path in self.folder.glob("*/.tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()

    def refresh(self) -> None:
        """Read what has changed on disk. A file that cannot be read lands in `problems`."""
        with self._lock:
            self._refresh("vectors", self._vectors, self._read_vector)
            self._refresh("presets", self._presets, self._read_preset)

    def _refresh(self, kind: str, table: dict[str, Any], read: Any) -> None:
        present = set()
        for path in sorted((self.folder / kind).glob(f"[!.]*{_SUFFIX[kind]}")):
            name = path.name.removesuffix(_SUFFIX[kind])
            present.add(name)
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            stamp = _stamp(status)
            if self._stamps.get(path) == stamp:
                continue
            self._stamps[path] = stamp
            self.problems.pop(path.name, None)
            table.pop(name, None)
            try:
                table[name] = read(path, check_id(name))
            except (TrimtabError, OSError, ValueError, RecursionError) as error:
                self.problems[path.name] = str(error)
        for name in set(table) - present:
            del table[name]
        for path in [p for p in self._stamps if p.parent.name == kind]:
            if path.name.removesuffix(_SUFFIX[kind]) not in present:
                del self._stamps[path]
        for file in [f for f in self.problems if f.endswith(_SUFFIX[kind])]:
            if file.removesuffix(_SUFFIX[kind]) not in present:
                del self.problems[file]

    def _fresh(self, kind: str, name: str, table: dict[str, Any]) -> None:
        if _ID.fullmatch(name) and ".." not in name:
            path = self._path(kind, name)
            try:
                status = path.stat()
                known = self._stamps.get(path) == _stamp(status)
            except FileNotFoundError:
                known = name not in table
            if not known:
                self.refresh()

    def _read_vector(self, path: Path, name: str) -> VectorArtifact:
        if path.stat().st_size > MAX_ARTIFACT_BYTES:
            raise ArtifactError(f"{path.name} is over {MAX_ARTIFACT_BYTES} bytes.")
        return from_bytes(path.read_bytes(), name=path.name).renamed(name)

    def _read_preset(self, path: Path, name: str) -> SteeringSpec:
        return parse_spec(json.loads(path.read_text(encoding="utf-8")), path=f"presets.{name}")

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / (check_id(name) + _SUFFIX[kind])

    # --- vectors

    def vectors(self) -> list[VectorArtifact]:
        """Return all readable vectors, by id."""
        with self._lock:
            self.refresh()
            return [self._vectors[name] for name in sorted(self._vectors)]

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        """Return a vector by id.

        Raises:
            NotFoundError: unknown id, with the nearest known one; or its file is damaged.
        """
        with self._lock:
            self._fresh("vectors", name, self._vectors)
            if name in self._vectors:
                return self._vectors[name]
            damaged = self.problems.get(name + _SUFFIX["vectors"])
            if damaged:
                raise NotFoundError(f"Vector {name!r} cannot be read: {damaged}", param=param)
            raise NotFoundError(
                f"Unknown vector {name!r}.{did_you_mean(name, self._vectors)} "
                f"Known: {listed(self._vectors)}. Build one with `trimtab vectors build`.",
                param=param,
            )

    def put_vector(self, vector: VectorArtifact) -> bool:
        """Store a vector, replacing one of the same id. Return True if the id was new."""
        with self._lock:
            path = self._path("vectors", vector.id)
            self.refresh()
            is_new = vector.id not in self._vectors
            self._bounded("vectors", self._vectors, is_new)
            write_atomically(path, to_bytes(vector))
            self.refresh()
            return is_new

    def delete_vector(self, name: str) -> None:
        """Remove a vector. Requests that run already keep their own copy.

        Raises:
            NotFoundError: unknown id.
        """
        self._delete("vectors", name, self._vectors)

    # --- presets

    def presets(self) -> dict[str, SteeringSpec]:
        """Return all presets by name."""
        with self._lock:
            self.refresh()
            return dict(sorted(self._presets.items()))

    def preset(self, name: str, *, param: str | None = None) -> SteeringSpec:
        """Return a preset by name.

        Raises:
            NotFoundError: unknown name.
        """
        with self._lock:
            self._fresh("presets", name, self._presets)
            if name not in self._presets:
                raise NotFoundError(
                    f"Unknown preset {name!r}.{did_you_mean(name, self._presets)} "
                    f"Known: {listed(self._presets)}.",
                    param=param,
                )
            return self._presets[name]

    def put_preset(self, name: str, spec: SteeringSpec) -> bool:
        """Store a preset. Return True if the name was new."""
        with self._lock:
            path = self._path("presets", name)
            self.refresh()
            is_new = name not in self._presets
            self._bounded("presets", self._presets, is_new)
            body = spec.model_dump(mode="json", exclude_defaults=True)
            write_atomically(path, json.dumps(body, indent=1).encode())
            self.refresh()
            return is_new

    def delete_preset(self, name: str) -> None:
        """Remove a preset.

        Raises:
            NotFoundError: unknown name.
        """
        self._delete("presets", name, self._presets)

    def _delete(self, kind: str, name: str, table: dict[str, Any]) -> None:
        with self._lock:
            path = self._path(kind, name)
            self.refresh()
            if name not in table and not path.exists():
                raise NotFoundError(
                    f"Unknown {kind[:-1]} {name!r}.{did_you_mean(name, table)} "
                    f"Known: {listed(table)}."
                )
            path.unlink(missing_ok=True)
            self.problems.pop(path.name, None)
            self.refresh()

    def _bounded(self, kind: str, table: dict[str, Any], is_new: bool) -> None:
        if is_new and len(table) >= MAX_ENTRIES:
            raise ArtifactError(f"The store holds {len(table)} {kind}, its limit; delete some.")

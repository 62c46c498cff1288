"""One folder of named things on disk, kept in memory: atomic writes, fresh reads, one bad file."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from trimtab.steering.artifact import MAX_ARTIFACT_BYTES
from trimtab.steering.errors import ArtifactError, NotFoundError, TrimtabError, did_you_mean, listed
from trimtab.steering.spec import ID_PATTERN

MAX_ENTRIES = 4096
_ID = re.compile(ID_PATTERN)
_STALE_S = 3600.0

T = TypeVar("T")


def check_id(name: str, *, param: str | None = None) -> str:
    """Return the id if it may name an artifact.

    Raises:
        ArtifactError: it could be mistaken for a path, or is too long.
    """
    if not _is_id(name):
        raise ArtifactError(
            f"{name[:80]!r} is not a valid id: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 64 characters.",
            param=param,
        )
    return name


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


class Shelf(Generic[T]):
    """Things of one kind, each a file named by its id.

    Safe to use from several threads. A file that another process wrote, replaced or removed is
    noticed at the next read of its name.

    Args:
        folder: where the files are; its name is the kind's plural. Made on the first write.
        suffix: of the files, with the dot.
        read: makes a thing of a file's bytes and its id.
        write: makes a file's bytes of a thing.
        hint: sentence after the refusal of an unknown id, such as how to make one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        suffix: str,
        read: Callable[[bytes, str], T],
        write: Callable[[T], bytes],
        hint: str = "",
    ) -> None:
        self._problems: dict[str, str] = {}
        self._folder, self._suffix = folder, suffix
        self._kind = folder.name.removesuffix("s")
        self._read, self._write, self._hint = read, write, hint
        self._lock = threading.RLock()
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._table: dict[str, T] = {}
        self._sweep()
        self.refresh()

    def all(self) -> dict[str, T]:
        """Return what can be read, by id."""
        with self._lock:
            self.refresh()
            return dict(sorted(self._table.items()))

    def get(self, name: str, *, param: str | None = None) -> T:
        """Return one.

        Raises:
            NotFoundError: unknown id, with the nearest known one; or its file is damaged.
        """
        with self._lock:
            if self._is_stale(name):
                self.refresh()
            if name in self._table:
                return self._table[name]
            damaged = self._problems.get(name + self._suffix)
            if damaged:
                raise NotFoundError(
                    f"{self._kind.capitalize()} {name!r} cannot be read: {damaged}", param=param
                )
            raise self._unknown(name, param=param)

    def has(self, name: str) -> bool:
        """Return whether there is a file of that id, damaged or not.

        Raises:
            ArtifactError: the id is not valid.
        """
        return self._path(name).exists()

    def put(self, name: str, thing: T) -> bool:
        """Store one, replacing what had its id. Return True if the id was new.

        Raises:
            ArtifactError: the id is not valid, or the shelf is full.
        """
        with self._lock:
            path = self._path(name)
            self.refresh()
            is_new = name not in self._table
            if is_new and len(self._table) >= MAX_ENTRIES:
                raise ArtifactError(
                    f"The store holds {len(self._table)} {self._folder.name}, its limit; "
                    "delete some."
                )
            write_atomically(path, self._write(thing))
            self.refresh()
            return is_new

    def delete(self, name: str) -> None:
        """Remove one, damaged or not.

        Raises:
            NotFoundError: unknown id.
        """
        with self._lock:
            path = self._path(name)
            self.refresh()
            if name not in self._table and not path.exists():
                raise self._unknown(name)
            path.unlink(missing_ok=True)
            self.refresh()

    def problems(self) -> dict[str, str]:
        """Return what is wrong with files that cannot be read, by folder and file name."""
        with self._lock:
            return {f"{self._folder.name}/{file}": why for file, why in self._problems.items()}

    def refresh(self) -> None:
        """Read what has changed on disk. A file that cannot be read is one of the `problems`."""
        with self._lock:
            present = set()
            for path in sorted(self._folder.glob(f"[!.]*{self._suffix}")):
                try:
                    stamp = _stamp(path.stat())
                except FileNotFoundError:
                    continue
                present.add(path.name)
                if self._stamps.get(path.name) != stamp:
                    self._forget(path.name)
                    self._stamps[path.name] = stamp
                    self._load(path)
            for file in set(self._stamps) - present:
                self._forget(file)

    def _load(self, path: Path) -> None:
        try:
            name = check_id(path.name.removesuffix(self._suffix))
            if path.stat().st_size > MAX_ARTIFACT_BYTES:
                raise ArtifactError(f"{path.name} is over {MAX_ARTIFACT_BYTES} bytes.")
            self._table[name] = self._read(path.read_bytes(), name)
        except (TrimtabError, OSError, ValueError, RecursionError) as error:
            self._problems[path.name] = str(error)

    def _forget(self, file: str) -> None:
        self._stamps.pop(file, None)
        self._problems.pop(file, None)
        self._table.pop(file.removesuffix(self._suffix), None)

    def _is_stale(self, name: str) -> bool:
        if not _is_id(name):
            return False
        try:
            stamp = _stamp(self._path(name).stat())
        except FileNotFoundError:
            return name in self._table
        return self._stamps.get(name + self._suffix) != stamp

    def _path(self, name: str) -> Path:
        return self._folder / (check_id(name) + self._suffix)

    def _unknown(self, name: str, *, param: str | None = None) -> NotFoundError:
        return NotFoundError(
            f"Unknown {self._kind} {name!r}.{did_you_mean(name, self._table)} "
            f"Known: {listed(self._table)}.{self._hint}",
            param=param,
        )

    def _sweep(self) -> None:
        """Remove what a killed writer left behind, once nobody can still be writing it."""
        for path in self._folder.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()


def _is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None and ".." not in name


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    # The inode tells two files of one size apart that were written within one clock tick.
    return status.st_mtime_ns, status.st_size, status.st_ino

"""Layers that are done, kept on disk so that an interrupted quantisation goes on where it was.

A layer counts once its file has its final name, and it gets that name by one rename after its bytes
are on the disk. What is half written has another name and is never read.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.steering.errors import ArtifactError, DataError
from trimtab.steering.model.manifest import flush
from trimtab.training.quantization.calibration_text import CalibrationText
from trimtab.training.quantization.layer_result import LayerResult, layer_from

_FACTS = "run.json"
_TEXT = "calibration.safetensors"
_LOCK = "lock"


class ProgressFolder:
    """The folder beside the result in which a run keeps what it has done.

    Args:
        folder: its place; made if need be.

    Raises:
        DataError: another process is at work in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"Another process is quantising into {str(folder)!r}. Wait for it, or choose "
                "another folder."
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def begin(self, facts: dict[str, Any]) -> int:
        """Compare with an earlier run's facts, or write them down.

        Args:
            facts: name -> what it is, strings and numbers: the model, the settings, the text.

        Returns:
            How many layers are done.

        Raises:
            DataError: an earlier run was about something else.
        """
        path = self.folder / _FACTS
        if not path.is_file():
            self._write(path, json.dumps(facts, indent=2, sort_keys=True).encode())
            return 0
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is unreadable: {error}. Delete the folder to begin anew."
            ) from error
        other = [k for k in sorted(facts.keys() | earlier) if facts.get(k) != earlier.get(k)]
        if other:
            said = "; ".join(f"{k} was {earlier.get(k)!r}, now {facts.get(k)!r}" for k in other)
            raise DataError(
                f"{str(self.folder)!r} holds an interrupted run that differs: {said}. Give the "
                f"same options to go on with it, or `rm -r {self.folder}` to begin anew."
            )
        done = 0
        while self._layer_path(done).is_file():
            done += 1
        return done

    def text(self) -> CalibrationText | None:
        """Return the text an earlier run wrote down, or None."""
        path = self.folder / _TEXT
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            origin = file.metadata()["origin"]
            return CalibrationText(file.get_tensor("ids"), file.get_tensor("held"), origin)

    def keep_text(self, text: CalibrationText) -> None:
        """Write the calibration text down."""
        self._save(
            self.folder / _TEXT, {"ids": text.ids, "held": text.held}, {"origin": text.origin}
        )

    def keep_layer(self, index: int, result: LayerResult) -> None:
        """Write a layer that is done down."""
        facts = {"facts": json.dumps(result.facts())}
        self._save(self._layer_path(index), result.tensors(), facts)

    def layer(self, index: int) -> LayerResult:
        """Read a layer that is done.

        Raises:
            ArtifactError: its file is damaged.
        """
        path = self._layer_path(index)
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return layer_from(tensors, facts)
        except Exception as error:  # safetensors has errors of its own
            raise ArtifactError(
                f"{path} is damaged ({error}). Delete it, and the layers from it on are done anew."
            ) from error

    def remove(self) -> None:
        """Delete the folder: the result is written."""
        self.close()
        shutil.rmtree(self.folder)

    def _layer_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata=metadata)
        self._settle(part, path)

    def _write(self, path: Path, content: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(content)
        self._settle(part, path)

    def _settle(self, part: Path, path: Path) -> None:
        flush(part)
        os.replace(part, path)
        flush(self.folder)

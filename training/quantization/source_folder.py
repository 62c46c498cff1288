"""The original model's files: which tensor of them is which parameter, and all that is not ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from trimtab.steering.errors import ModelLoadError, listed
from trimtab.steering.model.quantized.folder import is_quantized

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class SourceFolder:
    """A Hugging Face folder with safetensors weights.

    Args:
        path: the folder.

    Raises:
        ModelLoadError: it holds no safetensors weights, or ones that are quantised already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if is_quantized(json.loads((path / "config.json").read_text(encoding="utf-8"))):
            raise ModelLoadError(
                f"{path} is quantised already, and rounding it again would only lose more: give "
                "the original model."
            )
        if (path / _INDEX).is_file():
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            self._files = {name: path / file for name, file in index["weight_map"].items()}
        elif (path / _SINGLE).is_file():
            with safe_open(path / _SINGLE, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), path / _SINGLE)
        else:
            raise ModelLoadError(
                f"{path} holds no {_SINGLE}, and other kinds of weights cannot be quantised. Save "
                "the model with save_pretrained first."
            )
        self._by_words: dict[tuple[str, ...], list[str]] = {}
        for name in self._files:
            self._by_words.setdefault(_words(name), []).append(name)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def named(self, parameter: str) -> str:
        """Return the name a parameter of the model has here.

        transformers moved the parts of some multimodal models: `language_model.model.layers` of a
        checkpoint is `model.language_model.layers` of the model. Names of the same words are the
        same, if only one tensor has them.

        Raises:
            ModelLoadError: no tensor, or several.
        """
        if parameter in self._files:
            return parameter
        alike = self._by_words.get(_words(parameter), [])
        if len(alike) != 1:
            raise ModelLoadError(
                f"{self.path} has no tensor for {parameter!r} that could be replaced by a "
                f"quantised one (found {listed(alike)})."
            )
        return alike[0]

    def shards(
        self, *, without: Iterable[str], most_bytes: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the other tensors, as many at a time as fit in so many bytes, at least one.

        Args:
            without: names to leave out.
            most_bytes: of a shard.
        """
        left_out = set(without)
        by_file: dict[Path, list[str]] = {}
        for name in self.names:
            if name not in left_out:
                by_file.setdefault(self._files[name], []).append(name)
        shard: dict[str, torch.Tensor] = {}
        size = 0
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    tensor = file.get_tensor(name)
                    n_bytes = tensor.numel() * tensor.element_size()
                    if shard and size + n_bytes > most_bytes:
                        yield shard
                        shard, size = {}, 0
                    shard[name] = tensor
                    size += n_bytes
        if shard:
            yield shard

    @property
    def digest(self) -> str:
        """SHA-256 over the configuration and over each weights file's name, size and samples.

        The samples are spread over the file; all of a large model's bytes would take minutes.
        """
        found = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in sorted(set(self._files.values())):
            size = path.stat().st_size
            found.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    found.update(file.read(_SAMPLE_BYTES))
        return found.hexdigest()


def _words(name: str) -> tuple[str, ...]:
    return tuple(sorted(name.split(".")))

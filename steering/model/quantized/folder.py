"""Read what a quantised folder holds, and refuse one that is cut short or not ours to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trimtab.steering.errors import ModelLoadError, listed
from trimtab.steering.model.manifest import sha256_of
from trimtab.steering.model.quantized.facts import (
    KEY,
    STANDARD_KEY,
    QuantizationFacts,
    facts_from_json,
)
from trimtab.steering.model.quantized.groups import METHOD, Group, group_of, read_groups
from trimtab.steering.model.quantized.layout import (
    PACKED,
    SCALE,
    SUFFIXES,
    UNUSED_SUFFIXES,
    WEIGHT,
    Matrix,
    from_tensors,
)
from trimtab.steering.model.quantized.writer import INDEX_NAME, LORC_A, LORC_B, LORC_NAME

SINGLE_NAME = "model.safetensors"
_AGAIN = "Copy or download it again, or quantise the original again with `trimtab quantize`."


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantised model on disk, looked at but not loaded.

    Attributes:
        path: the folder.
        facts: how it was quantised.
        groups: the group of each quantised module, by the module's name in the checkpoint.
        files: the file of each tensor, by the tensor's name.
    """

    path: Path
    facts: QuantizationFacts
    groups: Mapping[str, Group]
    files: Mapping[str, str]

    @property
    def plain_names(self) -> list[str]:
        """Names of the tensors that belong to no quantised module; biases are among them."""
        taken = {f"{name}.{s}" for name in self.groups for s in (*SUFFIXES, *UNUSED_SUFFIXES)}
        return [name for name in self.files if name not in taken]

    def plain_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that belong to no quantised module.

        Raises:
            ModelLoadError: a file cannot be read.
        """
        yield from self._tensors(self.plain_names)

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the quantised matrices by module, file after file, one at a time.

        Raises:
            ModelLoadError: a tensor is missing, or of another shape or type than it must be.
        """
        for name, group in self.groups.items():
            wanted = [f"{name}.{suffix}" for suffix in group.layout.suffixes]
            missing = [tensor for tensor in wanted if tensor not in self.files]
            if missing:
                raise ModelLoadError(
                    f"{self.path} lacks {listed(missing)}, which its quantization_config asks "
                    f"for: it is incomplete. {_AGAIN}"
                )
            stored = {key.rpartition(".")[2]: tensor for key, tensor in self._tensors(wanted)}
            try:
                yield name, from_tensors(group.layout, stored)
            except ValueError as error:
                raise ModelLoadError(
                    f"{self.path} holds a damaged or foreign weight for {name!r}: {error}. {_AGAIN}"
                ) from None

    def low_rank(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the factors A and B of the correction, by module.

        Raises:
            ModelLoadError: the file is missing or incomplete.
        """
        if not self.facts.lorc_rank:
            return {}
        path = self.path / LORC_NAME
        with _readable(path), safe_open(path, framework="pt") as file:
            names = [n.removesuffix(f".{LORC_A}") for n in file.keys() if n.endswith(LORC_A)]  # noqa: SIM118
            return {
                name: (file.get_tensor(f"{name}.{LORC_A}"), file.get_tensor(f"{name}.{LORC_B}"))
                for name in names
            }

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file_name, members in by_file.items():
            path = self.path / file_name
            with _readable(path), safe_open(path, framework="pt") as file:
                for name in members:
                    yield name, file.get_tensor(name)


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a folder that this package reads."""
    standard = config.get(STANDARD_KEY)
    return KEY in config or (isinstance(standard, dict) and standard.get("quant_method") == METHOD)


def read_folder(path: Path, *, verify: bool = False) -> QuantizedFolder | None:
    """Look at a folder.

    Args:
        path: a folder with a config.json.
        verify: compare hashes also, not only sizes, where the folder records them.

    Returns:
        What it holds; None if it is not quantised, or in a way that is transformers' own matter.

    Raises:
        ModelLoadError: it is quantised in a way that trimtab does not read, or is not whole.
    """
    where = f"The model {str(path)!r}"
    config = _json(path / "config.json", where=where)
    if not is_quantized(config):
        return None
    groups = read_groups(config.get(STANDARD_KEY), where=where)
    if KEY in config:
        _check_files(path, config[KEY], where=where, verify=verify)
    files = _index(path, where=where)
    modules = _quantized_modules(files)
    if not modules:
        raise ModelLoadError(
            f"{where} says that it is quantised, and holds no such weight. {_AGAIN}"
        )
    by_module = {name: group_of(name, groups, where=where) for name in modules}
    facts = facts_of(config, where=where)
    assert facts is not None  # it is quantised, as was seen above
    return QuantizedFolder(path, facts, by_module, files)


def facts_of(config: Mapping[str, Any], *, where: str) -> QuantizationFacts | None:
    """Return what a config.json says of the quantisation.

    Args:
        config: its fields.
        where: what to call the model in errors.

    Returns:
        The facts, of a folder that others made the format alone; None if it is not quantised, or
        in a way that is transformers' own matter.

    Raises:
        ModelLoadError: it is quantised in a way that trimtab does not read.
    """
    if not is_quantized(config):
        return None
    if KEY in config:
        return facts_from_json(config[KEY], where=where)
    groups = read_groups(config[STANDARD_KEY], where=where)
    return QuantizationFacts(scheme="+".join(sorted({g.layout.format for g in groups})))


def _quantized_modules(files: Mapping[str, str]) -> list[str]:
    """Return the modules that have a packed weight, or a weight with a scale."""
    packed = [n.removesuffix(f".{PACKED}") for n in files if n.endswith(f".{PACKED}")]
    scaled = [n.removesuffix(f".{SCALE}") for n in files if n.endswith(f".{SCALE}")]
    eight = [n for n in scaled if f"{n}.{WEIGHT}" in files]
    # A scale alone is a module whose weight was lost; it is among these so that it is missed.
    return list(dict.fromkeys([*packed, *eight, *scaled]))


def _index(path: Path, *, where: str) -> dict[str, str]:
    """Return the file of each tensor, after reading every file's header."""
    if (path / INDEX_NAME).is_file():
        index = _json(path / INDEX_NAME, where=where).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise ModelLoadError(f"{where} has an unreadable {INDEX_NAME}. {_AGAIN}")
        foreign = [name for name in index.values() if Path(name).name != name]
        if foreign:
            raise ModelLoadError(f"{where} names {foreign[0]!r}, which is no file of its folder.")
    else:
        index = dict.fromkeys(_keys(path / SINGLE_NAME), SINGLE_NAME)
    for file_name in dict.fromkeys(index.values()):
        absent = {n for n, file in index.items() if file == file_name} - _keys(path / file_name)
        if absent:
            raise ModelLoadError(f"{path / file_name} lacks {listed(absent, most=3)}. {_AGAIN}")
    return index


def _keys(path: Path) -> set[str]:
    with _readable(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


def _check_files(path: Path, recorded: Any, *, where: str, verify: bool) -> None:
    """Compare the files of weights with what was recorded when they were written."""
    facts = recorded.get("files") if isinstance(recorded, dict) else None
    if not isinstance(facts, dict) or not facts:
        raise ModelLoadError(f"{where} lists no files under {KEY!r} in its config.json. {_AGAIN}")
    for name, fact in facts.items():
        file = path / name
        if Path(name).name != name or not isinstance(fact, dict):
            raise ModelLoadError(f"{where} has an unreadable list of files under {KEY!r}.")
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing. {_AGAIN}")
        size = file.stat().st_size
        if size != fact.get("size_bytes"):
            raise ModelLoadError(
                f"{file} has {size} bytes instead of {fact.get('size_bytes')}: it is not the file "
                f"that was written, or cut short. {_AGAIN}"
            )
        if verify and sha256_of(file) != fact.get("sha256"):
            raise ModelLoadError(f"{file} has changed since it was written. {_AGAIN}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        problem = "is missing" if not path.exists() else f"cannot be read: {error}"
        raise ModelLoadError(f"{path} {problem}. {_AGAIN}") from None


def _json(path: Path, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{where} has an unreadable {path.name}: {error}. {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where} has a {path.name} that is not an object.")
    return value

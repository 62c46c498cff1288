"""Write a quantised model part by part, so that it can be interrupted and never half seen.

Parts go into `NAME.partial` beside the target, each under a temporary name first. What is there
under its own name is whole; a second run with the same job leaves it alone. `finish` adds index and
configuration and gives the folder its name, in that order, so a folder of that name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.manifest import flush, sha256_of
from trimtab.steering.model.quantized.facts import KEY, STANDARD_KEY, QuantizationFacts
from trimtab.steering.model.quantized.groups import write_groups
from trimtab.steering.model.quantized.layout import Layout, Matrix, layout_of, to_tensors

INDEX_NAME = "model.safetensors.index.json"
LORC_NAME = "lorc.safetensors"
LORC_A, LORC_B = "lorc_a", "lorc_b"
_JOB_NAME = "job.json"
_PART = re.compile(r"[a-z0-9][a-z0-9-]*")
_LAYOUTS = "trimtab_layouts"  # in a part's header
# What is carried over from the source: tokenizer, templates, generation settings, licence.
_CARRIED = re.compile(r".*\.(json|txt|model|jinja|tiktoken)|LICENSE.*|NOTICE.*")
_LEFT = re.compile(r"config\.json|manifest\.json|.*\.index\.json")


class QuantizedFolderWriter:
    """Writes one quantised model.

    Args:
        target: the folder that will be; it must not exist.
        job: what is being made of what, JSON. Parts of an interrupted run are kept only if its job
            was the same.

    Raises:
        ModelLoadError: the target exists, or the interrupted run was another job.
    """

    def __init__(self, target: Path, *, job: Mapping[str, Any]) -> None:
        if target.exists():
            raise ModelLoadError(f"{target} exists already; give another folder, or remove it.")
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.partial.mkdir(parents=True, exist_ok=True)
        path, text = self.partial / _JOB_NAME, json.dumps(job, indent=2, sort_keys=True)
        if not path.exists():
            _write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ModelLoadError(
                f"{self.partial} holds an interrupted run with other settings or another model. "
                "Repeat its command to finish it, or remove the folder."
            )

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that are written."""
        names = (path.name for path in self.partial.glob("model-*.safetensors"))
        return frozenset(name[len("model-") : -len(".safetensors")] for name in names)

    def write(
        self,
        part: str,
        *,
        matrices: Mapping[str, Matrix],
        tensors: Mapping[str, torch.Tensor],
        low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        tensor_scales: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write a part, such as one decoder layer; a file of its own.

        Args:
            part: its name: small letters, digits and hyphens.
            matrices: quantised ones, by the module's name in the source's checkpoint.
            tensors: all others, by their full name there.
            low_rank: `A [n_out, r]` and `B [r, n_in]` of matrices that have a correction.
            tensor_scales: for M1 and M2 matrices that are multiplied as one, their common scale.

        Raises:
            ValueError: a name that is none, or a matrix that fits none of the layouts.
        """
        if not _PART.fullmatch(part):
            raise ValueError(f"{part!r} is no name for a part")
        layouts = {name: layout_of(matrix) for name, matrix in matrices.items()}
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for name, matrix in matrices.items():
            scale = (tensor_scales or {}).get(name)
            for suffix, tensor in to_tensors(matrix, tensor_scale=scale).items():
                stored[f"{name}.{suffix}"] = tensor.contiguous()
        if low_rank:
            factors = {}
            for name, (a, b) in low_rank.items():
                factors[f"{name}.{LORC_A}"], factors[f"{name}.{LORC_B}"] = a, b
            _save(self.partial / f"lorc-{part}.safetensors", factors, {})
        header = {name: [layout.format, layout.group_size] for name, layout in layouts.items()}
        # The model's file last: it is what says that the part is written.
        _save(self._path(part), stored, {_LAYOUTS: json.dumps(header)})

    def finish(self, source: Path, facts: QuantizationFacts, *, ignore: Iterable[str]) -> Path:
        """Write index and configuration, and give the folder its name.

        Args:
            source: the folder of the original model, whose configuration and tokenizer it keeps.
            facts: what to say of the quantisation.
            ignore: names of linear modules that were kept as they are.

        Returns:
            The target.

        Raises:
            ModelLoadError: no matrix was quantised.
        """
        weight_map: dict[str, str] = {}
        layouts: dict[str, Layout] = {}
        size = 0
        for part in sorted(self.parts):
            path = self._path(part)
            size += path.stat().st_size
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
                header = json.loads((file.metadata() or {})[_LAYOUTS])
            layouts |= {name: Layout(*layout) for name, layout in header.items()}
        if not layouts:
            raise ModelLoadError(
                f"Nothing of {source} could be quantised: no linear layer has whole groups."
            )
        self._merge_low_rank()
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(self.partial / INDEX_NAME, json.dumps(index, indent=2))
        self._carry(source)
        files = {
            path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(self.partial.glob("*.safetensors"))
        }
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config[STANDARD_KEY] = write_groups(
            layouts, ignore=ignore, has_fp8_activations=facts.activations == "fp8"
        )
        config[KEY] = facts.to_json(files=files)
        _write_text(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
        (self.partial / _JOB_NAME).unlink()
        flush(self.partial)
        self.partial.rename(self.target)
        flush(self.target.parent)
        return self.target

    def _path(self, part: str) -> Path:
        return self.partial / f"model-{part}.safetensors"

    def _merge_low_rank(self) -> None:
        """Make one file of all factors, which are a few percent of the weights."""
        paths = sorted(self.partial.glob("lorc-*.safetensors"))
        factors: dict[str, torch.Tensor] = {}
        # The merged file too: an interrupted merge may have removed some of the parts.
        merged = self.partial / LORC_NAME
        for path in [merged, *paths] if merged.exists() else paths:
            with safe_open(path, framework="pt") as file:
                factors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if paths:
            _save(merged, factors, {})
        for path in paths:
            path.unlink()

    def _carry(self, source: Path) -> None:
        for path in sorted(source.iterdir()):
            is_wanted = _CARRIED.fullmatch(path.name) and not _LEFT.fullmatch(path.name)
            if is_wanted and path.is_file():
                shutil.copyfile(path, self.partial / path.name)
                flush(self.partial / path.name)


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    flush(temporary)
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)

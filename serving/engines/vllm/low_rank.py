"""The low-rank factors of a quantised folder, which stand in a file of their own.

Other loaders know nothing of them, so the index does not name the file and vLLM does not read it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized.writer import LORC_A, LORC_B, LORC_NAME

A, B = f".{LORC_A}", f".{LORC_B}"


class LowRankFile:
    """Factors by the name of the matrix they belong to; read when they are asked for.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
        self._names = {key.removesuffix(A): key.removesuffix(A) for key in keys if key.endswith(A)}
        wanted = {name + suffix for name in self._names for suffix in (A, B)}
        if wanted != keys:
            raise ModelLoadError(
                f"{path} holds {sorted(wanted ^ keys)[:3]} without its counterpart."
            )
        self._taken: set[str] = set()

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Let the factors be asked for under the names that vLLM gives a model's layers."""
        renamed = ((new_name(name), stored) for name, stored in self._names.items())
        self._names = {name: stored for name, stored in renamed if name is not None}

    def take(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return A `[n_out, rank]` and B `[rank, n_in]` of a matrix, None if it has none."""
        from safetensors import safe_open

        stored = self._names.get(name)
        if stored is None:
            return None
        self._taken.add(name)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(stored + A), file.get_tensor(stored + B)

    def untaken(self) -> list[str]:
        """Return the matrices whose factors nobody has asked for."""
        return sorted(set(self._names) - self._taken)


def check_factors_taken(config: Any, model: Any) -> None:
    """See that no low-rank factor of a layer that is here was left out.

    Args:
        config: vLLM's quantisation configuration, of any method.
        model: what this worker has loaded.

    Raises:
        ModelLoadError: names a factor.
    """
    low_rank = getattr(config, "low_rank", None)
    if not isinstance(low_rank, LowRankFile):
        return
    for name in low_rank.untaken():
        try:
            model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            continue  # another worker's layer
        raise ModelLoadError(
            f"{LORC_NAME} has factors for {name}, which vLLM's model has no use for."
        )

"""Key and value cache of the packed runner: one fixed row a running sequence.

Memory is reserved once. On the CPU the operating system commits pages only when they are written,
so an unused row costs nothing; on an accelerator the whole reservation is real.

The cache must never hold NaN or infinity, not even where nobody looks: a masked key has weight 0,
and 0 times NaN is NaN. So it starts as zeros, and a broken sequence's row is wiped.
"""

from __future__ import annotations

import math

import numpy as np
import torch


class KVRows:
    """Keys and values of every layer, `[n_rows, n_kv_heads, max_tokens, head_dim]` each.

    Layers are allocated when first written, because models differ in heads from layer to layer.

    Args:
        n_rows: sequences that can run at once.
        max_tokens: longest sequence.
    """

    def __init__(self, *, n_rows: int, max_tokens: int) -> None:
        self.n_rows = n_rows
        self.max_tokens = max_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, index: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's rows, shaped after `key` and `value` `[1, heads, t, d]`."""
        rows = self._layers.get(index)
        if rows is None:
            rows = (self._new(key), self._new(value))
            self._layers[index] = rows
        return rows

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.n_rows, like.shape[1], self.max_tokens, like.shape[3])
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # numpy asks the system for zeroed pages; torch.zeros would write, and so commit, them all.
        n_bytes = math.prod(shape) * like.dtype.itemsize
        return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(like.dtype).view(shape)

    def wipe(self, row: int, n_tokens: int) -> None:
        """Overwrite the first tokens of a row with zeros."""
        for keys, values in self._layers.values():
            keys[row, :, :n_tokens] = 0
            values[row, :, :n_tokens] = 0

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first tokens of one row over another."""
        for keys, values in self._layers.values():
            keys[target, :, :n_tokens] = keys[source, :, :n_tokens]
            values[target, :, :n_tokens] = values[source, :, :n_tokens]


def bytes_per_token(config: object, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values one token takes over all layers, from a text config."""
    get = lambda name: getattr(config, name, None)  # noqa: E731
    heads = get("num_attention_heads") or 1
    kv_heads = get("num_key_value_heads") or heads
    head_dim = get("head_dim") or (get("hidden_size") or 0) // heads
    return 2 * (get("num_hidden_layers") or 1) * kv_heads * head_dim * dtype.itemsize

"""Attention over a tree: one prompt read once, with several answers that do not see each other.

A row of the model's input holds the prompt's last part and, after it, each answer. What stands
before the part that varies is read once and its keys and values are kept (`Trunk`). Registered
with transformers as an attention function, so any model that uses its attention interface works.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.attribution.gradient_scale import scale_gradient
from trimtab.kernels.attention import softmax_attention
from trimtab.steering.model.attention import attending_by

NAME = "trimtab_tree"
_active = threading.local()


@dataclass
class Trunk:
    """Keys and values of the prompt's constant beginning, layer -> `[1, kv_heads, n, d]`."""

    n_tokens: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Tree:
    """Where each token of a row stands.

    Attributes:
        trunk: what was read before; empty if nothing was.
        n_stem: tokens of the prompt in the row, which come first.
        branches: tokens of each answer in the row, in order.
        hidden: `[batch, n_stem]`, bool: prompt tokens that nothing may attend to; None hides none.
        keeps: fill the trunk with this pass's keys and values.
        is_lrp: change the gradient by AttnLRP's rules for attention (see `attribution.lrp`).
    """

    trunk: Trunk
    n_stem: int
    branches: tuple[int, ...]
    device: torch.device
    hidden: torch.Tensor | None = None
    keeps: bool = False
    is_lrp: bool = False
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def positions(self) -> torch.Tensor:
        """Return each token's position in its own prompt and answer, `[1, n]`, int64."""
        end = self.trunk.n_tokens + self.n_stem
        parts = [torch.arange(self.trunk.n_tokens, end)]
        parts += [torch.arange(end, end + n) for n in self.branches]
        return torch.cat(parts).unsqueeze(0).to(self.device)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return which keys each token sees, `[1 or batch, 1, n, n_trunk + n]`, bool."""
        if window not in self._masks:
            positions = self.positions()[0]
            before = torch.arange(self.trunk.n_tokens, device=self.device)
            of = [torch.full((self.n_stem,), -1)]
            of += [torch.full((n,), i) for i, n in enumerate(self.branches)]
            branch = torch.cat(of).to(self.device)
            at = torch.cat([before, positions])
            whose = torch.cat([torch.full_like(before, -1), branch])
            seen = (at <= positions.unsqueeze(1)) & ((whose == -1) | (whose == branch.unsqueeze(1)))
            if window is not None:
                seen &= at > positions.unsqueeze(1) - window
            mask = seen[None, None]
            if self.hidden is not None:
                start = self.trunk.n_tokens
                gone = torch.zeros(len(self.hidden), 1, 1, mask.shape[-1], device=self.device)
                gone[:, 0, 0, start : start + self.n_stem] = self.hidden.to(gone)
                own = torch.arange(mask.shape[-2], device=self.device) + start
                keeps_itself = own.unsqueeze(1) == torch.arange(mask.shape[-1], device=self.device)
                mask = mask & (~gone.bool() | keeps_itself)
            self._masks[window] = mask
        return self._masks[window]


@contextmanager
def attending(configs: Sequence[Any], tree: Tree) -> Iterator[None]:
    """Make a model with these configs attend by `tree` inside the block, then undo it."""
    _active.tree = tree
    try:
        with attending_by(configs, NAME):
            yield
    finally:
        _active.tree = None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    tree: Tree = _active.tree
    layer: int = module.layer_idx  # type: ignore[assignment]
    if tree.keeps:
        tree.trunk.keys[layer], tree.trunk.values[layer] = key.detach(), value.detach()
        keys, values = key, value
    elif tree.trunk.n_tokens:
        # One trunk for all rows of the batch.
        keys, values = (
            torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=2)
            for kept, new in ((tree.trunk.keys[layer], key), (tree.trunk.values[layer], value))
        )
    else:
        keys, values = key, value
    if tree.is_lrp:
        query, keys = scale_gradient(query, 0.25), scale_gradient(keys, 0.25)
        values = scale_gradient(values, 0.5)
    attended = softmax_attention(
        query,
        keys,
        values,
        mask=tree.mask(sliding_window),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return attended.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)

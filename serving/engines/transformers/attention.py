"""Attention over a packed batch: every sequence's new tokens in one row of the model's input.

The model runs its projections and MLPs on all tokens of the step at once; only attention has to
know the sequences. Single-token sequences (decoding) are attended together, prompt chunks one by
one. Registered with transformers as an attention function, so any model that uses its attention
interface works unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.kernels.attention import softmax_attention
from trimtab.serving.engines.transformers.kv import KVRows
from trimtab.steering.model.attention import attending_by

NAME = "trimtab_packed"
_active = threading.local()


@dataclass(frozen=True)
class Segment:
    """A prompt chunk: tokens `[start, stop)` of the packed row, at positions from `position`."""

    row: int
    start: int
    stop: int
    position: int


@dataclass
class PackedBatch:
    """Where each token of a packed forward pass belongs.

    Attributes:
        kv: the cache.
        rows: cache rows of the decoding sequences, whose tokens come first, `[n_decode]`, int64.
        lengths: their number of tokens including the new one, `[n_decode]`, int64.
        segments: the prompt chunks that follow.
    """

    kv: KVRows
    rows: torch.Tensor
    lengths: torch.Tensor
    segments: tuple[Segment, ...]
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.rows.tolist()
        self.n_decode = len(rows)
        first = rows[0] if rows else 0
        # Neighbouring rows are read in place; others must be gathered into a copy.
        self.block = rows == list(range(first, first + len(rows)))
        self.first = first
        self.longest = int(self.lengths.max()) if rows else 0
        self.positions = self.lengths - 1

    def decode_mask(self, window: int | None) -> torch.Tensor | None:
        """Return which cached tokens each decoding sequence sees, `[n_decode, 1, 1, longest]`."""
        if window not in self._masks:
            at = torch.arange(self.longest, device=self.lengths.device)
            seen = at < self.lengths.unsqueeze(1)
            if window is not None:
                seen &= at >= (self.lengths - window).unsqueeze(1)
            self._masks[window] = None if bool(seen.all()) else seen[:, None, None]
        return self._masks[window]


@contextmanager
def packed_attention(configs: Sequence[Any], batch: PackedBatch) -> Iterator[None]:
    """Make a model with these configs attend by `batch` inside the block, then undo it."""
    _active.batch = batch
    try:
        with attending_by(configs, NAME):
            yield
    finally:
        _active.batch = None


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
    batch: PackedBatch = _active.batch
    n_heads, n_tokens = query.shape[1:3]
    keys, values = batch.kv.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
    out = query.new_empty(1, n_tokens, n_heads, value.shape[3])
    n = batch.n_decode
    attend = partial(softmax_attention, scale=scaling, softcap=softcap, sinks=s_aux)
    if n:
        k_new, v_new = key[0, :, :n].transpose(0, 1), value[0, :, :n].transpose(0, 1)
        if n == 1:
            row, at = batch.first, batch.longest - 1
            keys[row, :, at] = k_new[0]
            values[row, :, at] = v_new[0]
        else:
            keys[batch.rows, :, batch.positions] = k_new
            values[batch.rows, :, batch.positions] = v_new
        where = slice(batch.first, batch.first + n) if batch.block else batch.rows
        attended = attend(
            query[0, :, :n].transpose(0, 1).unsqueeze(2),
            keys[where][:, :, : batch.longest],
            values[where][:, :, : batch.longest],
            mask=batch.decode_mask(sliding_window),
        )
        out[0, :n] = attended.squeeze(2)
    for segment in batch.segments:
        tokens = slice(segment.start, segment.stop)
        end = segment.position + segment.stop - segment.start
        keys[segment.row, :, segment.position : end] = key[0, :, tokens]
        values[segment.row, :, segment.position : end] = value[0, :, tokens]
        mask = _segment_mask(segment, end, sliding_window, device=query.device)
        attended = attend(
            query[:, :, tokens],
            keys[segment.row : segment.row + 1, :, :end],
            values[segment.row : segment.row + 1, :, :end],
            mask=mask,
            is_causal=mask is None,
        )
        out[0, tokens] = attended[0].transpose(0, 1)
    return out, None


def _segment_mask(
    segment: Segment, end: int, window: int | None, *, device: torch.device
) -> torch.Tensor | None:
    if segment.position == 0 and (window is None or end <= window):
        return None  # plain causal, which the kernel does without a mask
    own = torch.arange(segment.position, end, device=device).unsqueeze(1)
    at = torch.arange(end, device=device)
    seen = at <= own
    if window is not None:
        seen &= at > own - window
    return seen[None, None]


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)

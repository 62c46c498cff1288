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
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.serving.engines.transformers.kv import KVRows

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


def attention_configs(model: nn.Module) -> list[Any]:
    """Return the distinct configs of a model's parts; each names its attention function."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(configs.values())


@contextmanager
def packed_attention(configs: Sequence[Any], batch: PackedBatch) -> Iterator[None]:
    """Make a model with these configs attend by `batch` inside the block, then undo it."""
    saved = [config._attn_implementation for config in configs]
    _active.batch = batch
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _active.batch = None
        for config, name in zip(configs, saved, strict=True):
            config._attn_implementation_internal = name


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
    attend = partial(_softmax_attention, scale=scaling, softcap=softcap, sinks=s_aux)
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


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention with grouped heads: query `[b, heads, q, d]`, key and value `[b, kv_heads, k, d]`.

    One query token with grouped heads is seen as `heads / kv_heads` query tokens of each key
    head: the same numbers without copying keys and values for every head.
    """
    b, n_heads, n_query, _ = query.shape
    groups = n_heads // key.shape[1]
    if softcap is not None or sinks is not None:
        return _eager_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            is_causal=is_causal,
        )
    if n_query == 1 and groups > 1:
        packed = query.reshape(b, key.shape[1], groups, -1)
        done = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        return done.reshape(b, n_heads, 1, -1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal and n_query > 1,
        scale=scale,
        enable_gqa=groups > 1,
    )


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """The same with logit soft-capping (Gemma 2) or attention sinks (gpt-oss), in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).float() for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        n = query.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return (weights @ value).to(query.dtype)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)

"""Softmax attention with grouped heads, soft-capping and sinks. Plain torch, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def softmax_attention(
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

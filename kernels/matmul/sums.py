"""The end of a product whose columns were split: partial sums are added, in their order.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_splits(
    partial,  # [SPLITS, n_tokens, n_out], float32
    token_scales,  # [n_tokens], float32, or None
    rows,  # [n_out], float32
    bias,  # [n_out] or None
    y,  # [n_tokens, n_out]
    n_tokens,
    n_out,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_out
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * n_tokens + token) * n_out + column
        total += tl.load(partial + at, mask=inside, other=0.0)
    if token_scales is not None:
        total *= tl.load(token_scales + token)
    total *= tl.load(rows + column, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * n_out + column, total.to(y.dtype.element_ty), mask=inside)

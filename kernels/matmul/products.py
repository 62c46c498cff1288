"""The products: weights are decoded in registers, as the tensor cores' first operand.

    y^T = W x^T:  a program has BN rows of W and BM tokens, 256 columns at a time

With the weights first, 64 rows fill an instruction whatever the number of tokens. Columns may be
split between programs; each then writes its sums apart, and `sums.py` adds them in their order, so
that equal inputs give equal bits. Which columns a program sums does not depend on the number of
tokens.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.matmul.decode import fp8_operands, half_operands, scale_offsets


@triton.jit
def _rows_at(rn, n_blocks, first):
    """Return which row of which block each row's first block is, counted in rows, int64."""
    return ((rn // 64).to(tl.int64) * n_blocks + first) * 64 + rn % 64


@triton.jit
def _store(total, factors, bias, y, rm, rn, n_tokens, n_out, split, IS_SPLIT: tl.constexpr):
    """Write a program's sums `[BN, BM]`: as they are if columns are split, or finished."""
    inside = (rn[:, None] < n_out) & (rm[None, :] < n_tokens)
    if IS_SPLIT:
        at = (split.to(tl.int64) * n_tokens + rm[None, :]) * n_out + rn[:, None]
        tl.store(y + at, total, mask=inside)
    else:
        total *= tl.load(factors + rn, mask=rn < n_out, other=0.0)[:, None]
        if bias is not None:
            total += tl.load(bias + rn, mask=rn < n_out, other=0.0).to(tl.float32)[:, None]
        at = rm[None, :].to(tl.int64) * n_out + rn[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def w4a8(
    x,  # [n_tokens, 256 * n_blocks], float8e4nv, columns in the order of fragments
    token_scales,  # [n_tokens], float32
    codes,  # [n_out / 64, n_blocks, 64, 128], uint8
    scales,  # [n_out / 64, n_blocks, 64, 4, EACH], uint8
    rows,  # [n_out], float32
    bias,  # [n_out] or None
    y,  # [n_tokens, n_out], or [SPLITS, n_tokens, n_out] in float32
    n_tokens,
    n_out,
    n_blocks,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(2) * BM + tl.arange(0, BM)
    at = tl.arange(0, 128)
    first, last = n_blocks * split // SPLITS, n_blocks * (split + 1) // SPLITS
    in_rows = rn[:, None] < n_out
    row = _rows_at(rn, n_blocks, first)
    # Tokens past the last read the last: a mask costs an instruction a load, and nothing is stored.
    there = tl.minimum(rm, n_tokens - 1)[:, None].to(tl.int64)
    x_at = x + (there * n_blocks + first) * 256 + at[None, :]
    codes_at = codes + row[:, None] * 128 + at[None, :]
    scales_at = scales + row[:, None, None] * (4 * EACH) + scale_offsets(4, EACH)
    total = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(codes_at, mask=in_rows, other=0)
        tops = tl.load(scales_at, mask=in_rows[:, :, None], other=0)
        x0 = tl.load(x_at)
        x1 = tl.load(x_at + 128)
        w0, w1 = fp8_operands(packed, tops)
        # Tensor cores add FP8 products with about 14 bits; float32 takes over every 256 columns.
        part = tl.dot(w0, x0.T)
        total += tl.dot(w1, x1.T, part)
        codes_at += 64 * 128
        scales_at += 64 * 4 * EACH
        x_at += 256
    if SPLITS == 1:
        total *= tl.load(token_scales + rm, mask=rm < n_tokens, other=0.0)[None, :]
    _store(total, rows, bias, y, rm, rn, n_tokens, n_out, split, SPLITS > 1)


@triton.jit
def w4a16(
    x,  # [n_tokens, n_in], bfloat16 or float16
    codes,  # [n_out / 64, n_blocks, 64, 64], uint16
    scales,  # [n_out / 64, n_blocks, 64, THREADS, EACH], uint8 or int32
    rows,  # [n_out], float32
    bias,  # [n_out] or None
    y,  # [n_tokens, n_out], or [SPLITS, n_tokens, n_out] in float32
    n_tokens,
    n_out,
    n_in,
    n_blocks,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # n_in is 256 * n_blocks
):
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(2) * BM + tl.arange(0, BM)
    at = tl.arange(0, 64)
    # Column of place (i, h, t, c) for the first operand; the others' are 2, 4 and 6 further.
    pair = at // 2 % 4 * 64 + at // 16 * 16 + at // 8 % 2 * 8
    column = pair + at % 2
    first, last = n_blocks * split // SPLITS, n_blocks * (split + 1) // SPLITS
    in_rows = rn[:, None] < n_out
    row = _rows_at(rn, n_blocks, first)
    there = tl.minimum(rm, n_tokens - 1)[:, None].to(tl.int64)  # as above
    x_at = x + there * x_stride + first * 256 + column[None, :]
    codes_at = codes + row[:, None] * 64 + at[None, :]
    scales_at = scales + row[:, None, None] * (THREADS * EACH) + scale_offsets(THREADS, EACH)
    total = tl.zeros((BN, BM), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(codes_at, mask=in_rows, other=0)
        factors = tl.load(scales_at, mask=in_rows[:, :, None], other=0)
        if IS_WHOLE:
            x0 = tl.load(x_at)
            x1 = tl.load(x_at + 2)
            x2 = tl.load(x_at + 4)
            x3 = tl.load(x_at + 6)
        else:
            # n_in is even, so a pair is there or not: a mask for each column would split the loads.
            left = n_in - block * 256 - pair[None, :]
            x0 = tl.load(x_at, mask=left > 0, other=0.0)
            x1 = tl.load(x_at + 2, mask=left > 2, other=0.0)
            x2 = tl.load(x_at + 4, mask=left > 4, other=0.0)
            x3 = tl.load(x_at + 6, mask=left > 6, other=0.0)
        w0, w1, w2, w3 = half_operands(packed, factors, x.dtype.element_ty == tl.bfloat16)
        # A sum of its own for each block: with one that lives through the loop ptxas lets each
        # tensor-core instruction wait for the one before (C7515) in the smallest tile.
        part = tl.dot(w0, x0.T)
        part = tl.dot(w1, x1.T, part)
        part = tl.dot(w2, x2.T, part)
        total += tl.dot(w3, x3.T, part)
        codes_at += 64 * 64
        scales_at += 64 * THREADS * EACH
        x_at += 256
    _store(total, rows, bias, y, rm, rn, n_tokens, n_out, split, SPLITS > 1)

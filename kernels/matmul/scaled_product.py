"""W4A8 of MXFP4 on Blackwell, whose tensor cores take the scales themselves.

For NVFP4 they don't: `tl.dot_scaled` of FP8 and NVFP4 compiles to the instruction for groups of 32
under powers of two, which is another product. NVFP4 and the rest go Hopper's way there.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def w4a8_scaled(
    x,  # [n_tokens, n_in], float8e4nv
    token_scales,  # [n_tokens], float32
    codes,  # [n_out, n_in / 2], uint8, the even column in the low half
    scales,  # [n_out, n_in / 32], uint8, powers of two
    bias,  # [n_out] or None
    y,  # [n_tokens, n_out]
    n_tokens,
    n_out,
    n_in,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    column, pair, group = tl.arange(0, BK), tl.arange(0, BK // 2), tl.arange(0, BK // 32)
    in_rows, in_tokens = rn[:, None] < n_out, rm[:, None] < n_tokens
    x_at = x + rm[:, None].to(tl.int64) * n_in + column[None, :]
    codes_at = codes + rn[:, None].to(tl.int64) * (n_in // 2) + pair[None, :]
    scales_at = scales + rn[:, None].to(tl.int64) * (n_in // 32) + group[None, :]
    # Without scales for both operands Triton would turn both into bfloat16; 127 is 2^0.
    ones = tl.full((BM, BK // 32), 127, tl.uint8)
    total = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(0, n_in, BK, num_stages=STAGES):
        left = n_in - start
        packed = tl.load(codes_at, mask=in_rows & (2 * pair[None, :] < left), other=0)
        powers = tl.load(scales_at, mask=in_rows & (32 * group[None, :] < left), other=0)
        tokens = tl.load(x_at, mask=in_tokens & (column[None, :] < left), other=0.0)
        total = tl.dot_scaled(packed, powers, "e2m1", tokens.T, ones, "e4m3", total)
        x_at += BK
        codes_at += BK // 2
        scales_at += BK // 32
    total *= tl.load(token_scales + rm, mask=rm < n_tokens, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + rn, mask=rn < n_out, other=0.0).to(tl.float32)[:, None]
    at = rm[None, :].to(tl.int64) * n_out + rn[:, None]
    inside = (rn[:, None] < n_out) & (rm[None, :] < n_tokens)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)

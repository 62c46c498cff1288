"""A whole matrix decoded to scratch memory, for products with so many tokens that it pays.

A program decodes one block of fragments; those are padded to whole blocks, so loads need no mask.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.matmul.decode import fp8_operands, half_operands, scale_offsets


@triton.jit
def expand_fp8(
    codes,  # [n_out / 64, n_blocks, 64, 128], uint8
    scales,  # [n_out / 64, n_blocks, 64, 4, EACH], uint8
    w,  # [n_rows, 256 * n_blocks], float8e4nv, columns in the order of fragments
    n_rows,
    n_blocks,
    EACH: tl.constexpr,
):
    block, row = tl.program_id(0), tl.arange(0, 64)
    at = tl.arange(0, 128)
    stored = (tl.program_id(1).to(tl.int64) * n_blocks + block) * 64 + row
    packed = tl.load(codes + stored[:, None] * 128 + at[None, :])
    tops = tl.load(scales + stored[:, None, None] * (4 * EACH) + scale_offsets(4, EACH))
    w0, w1 = fp8_operands(packed, tops)
    rn = tl.program_id(1) * 64 + row
    out = w + (rn[:, None].to(tl.int64) * n_blocks + block) * 256 + at[None, :]
    tl.store(out, w0, mask=rn[:, None] < n_rows)
    tl.store(out + 128, w1, mask=rn[:, None] < n_rows)


@triton.jit
def expand_half(
    codes,  # [n_out / 64, n_blocks, 64, 64], uint16
    scales,  # [n_out / 64, n_blocks, 64, THREADS, EACH], uint8 or int32
    rows,  # [n_out], float32
    w,  # [n_out, n_in], columns as they are
    n_out,
    n_in,
    n_blocks,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    block, row = tl.program_id(0), tl.arange(0, 64)
    at = tl.arange(0, 64)
    stored = (tl.program_id(1).to(tl.int64) * n_blocks + block) * 64 + row
    packed = tl.load(codes + stored[:, None] * 64 + at[None, :])
    offsets = scale_offsets(THREADS, EACH)
    factors = tl.load(scales + stored[:, None, None] * (THREADS * EACH) + offsets)
    w0, w1, w2, w3 = half_operands(packed, factors, IS_BFLOAT16)
    # Neighbouring columns are (operand, c); join puts the operand last, so c moves behind it.
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    values = joined.reshape(64, 32, 2, 4).permute(0, 1, 3, 2).reshape(64, 32, 8)
    run = tl.arange(0, 32)  # (i, h, t), each 8 columns
    start = block * 256 + run % 4 * 64 + run // 8 * 16 + run // 4 % 2 * 8
    column = start[None, :, None] + tl.arange(0, 8)[None, None, :]
    rn = tl.program_id(1) * 64 + row
    inside = rn < n_out
    factor = tl.load(rows + rn, mask=inside, other=0.0)
    values = (values.to(tl.float32) * factor[:, None, None]).to(w.dtype.element_ty)
    out = w + rn[:, None, None].to(tl.int64) * n_in + column
    tl.store(out, values, mask=inside[:, None, None] & (column < n_in))

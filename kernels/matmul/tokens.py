"""Activations to FP8, token by token, with columns in the order of the weights' fragments.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
_TINY = tl.constexpr(1.1754943508222875e-38)  # below it a scale is no normal float32


@triton.jit
def _column_of(place):
    """Return the column at each place: (o, i, h, t, c) is 64 t + 16 i + 8 h + 4 o + c."""
    inner = place % 128
    thread, i, h = inner // 4 % 4, inner // 32, inner // 16 % 2
    operand = place // 128 % 2
    return place // 256 * 256 + thread * 64 + i * 16 + h * 8 + operand * 4 + place % 4


@triton.jit
def quantize_tokens(
    x,  # [n_tokens, n_in]
    q,  # [n_tokens, n_places], float8e4nv
    scales,  # [n_tokens], float32
    n_in,
    n_places,  # n_in, up to a multiple of 256
    x_stride,
    BLOCK: tl.constexpr,
    IS_ONE: tl.constexpr,  # a token fits into one block, and is read once
):
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    q += token * n_places
    place = tl.arange(0, BLOCK)
    if IS_ONE:
        column = _column_of(place)
        values = tl.load(x + column, mask=column < n_in, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(values))
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, n_in, BLOCK):
            some = tl.load(x + start + place, mask=start + place < n_in, other=0.0)
            most = tl.maximum(most, tl.abs(some.to(tl.float32)))
        largest = tl.max(most)
    scale = tl.math.div_rn(largest, LARGEST)
    scale = tl.where(scale < _TINY, 1.0, scale)
    tl.store(scales + token, scale)
    if IS_ONE:
        tl.store(q + place, _rounded(values, scale), mask=place < n_places)
    else:
        for start in tl.range(0, n_places, BLOCK):
            column = _column_of(start + place)
            values = tl.load(x + column, mask=column < n_in, other=0.0).to(tl.float32)
            tl.store(q + start + place, _rounded(values, scale), mask=start + place < n_places)


@triton.jit
def _rounded(values, scale):
    # The division of IEEE 754, as torch's: an approximate one would round other values up.
    return tl.math.div_rn(values, scale + tl.zeros_like(values)).to(tl.float8e4nv)

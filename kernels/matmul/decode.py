"""Codes to tensor-core operands inside a kernel, shared by the products and the expansions.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.matmul import ptx

_FP8_TABLES = tl.constexpr(ptx.FP8_TABLES)
_FP8_CODES = tl.constexpr(ptx.FP8_CODES)
_BFLOAT16_SCALES = tl.constexpr(ptx.BFLOAT16_SCALES)
_BFLOAT16_CODES = tl.constexpr(ptx.BFLOAT16_CODES)
_FLOAT16_SCALES = tl.constexpr(ptx.FLOAT16_SCALES)
_FLOAT16_CODES = tl.constexpr(ptx.FLOAT16_CODES)
_INT4_SCALES = tl.constexpr(ptx.INT4_SCALES)
_INT4_BFLOAT16_CODES = tl.constexpr(ptx.INT4_BFLOAT16_CODES)
_INT4_FLOAT16_CODES = tl.constexpr(ptx.INT4_FLOAT16_CODES)


@triton.jit
def scale_offsets(THREADS: tl.constexpr, EACH: tl.constexpr):
    """Return where a row's scales are, `[1, EACH, THREADS]`: the order in which they are used."""
    return tl.arange(0, THREADS)[None, None, :] * EACH + tl.arange(0, EACH)[None, :, None]


# `expand_dims` and `broadcast_to` and no reshape of the scales themselves: only through these does
# Triton carry the operand's layout back to the load, and so spare a trip through shared memory.
@triton.jit
def spread(values, PER: tl.constexpr, ELEMENTS: tl.constexpr):
    """Return values `[rows, each, threads]` at each element they are for, `[rows, elements]`.

    Args:
        PER: neighbouring elements of a thread.
    """
    ROWS: tl.constexpr = values.shape[0]
    EACH: tl.constexpr = values.shape[1]
    THREADS: tl.constexpr = values.shape[2]
    shape: tl.constexpr = (ROWS, EACH, 8 // EACH, THREADS, 4 // THREADS, PER)
    return tl.broadcast_to(values[:, :, None, :, None, None], shape).reshape(ROWS, ELEMENTS)


@triton.jit
def fp8_operands(codes, scales):
    """Decode a block to FP8.

    Args:
        codes: `[rows, 128]`, uint8.
        scales: `[rows, each, 4]`, uint8.

    Returns:
        Two operands, `[rows, 128]`, float8e4nv.
    """
    low, high = tl.inline_asm_elementwise(
        _FP8_TABLES,
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        [scales],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=4,
    )
    return tl.inline_asm_elementwise(
        _FP8_CODES,
        "=r,=r,r,r,r,r,r,r,r,r,r",
        [codes, spread(low, 4, 128), spread(high, 4, 128)],
        dtype=(tl.float8e4nv, tl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@triton.jit
def half_operands(codes, scales, IS_BFLOAT16: tl.constexpr):
    """Decode a block to bfloat16 or float16.

    Args:
        codes: `[rows, 64]`, uint16.
        scales: `[rows, each, threads]`, uint8 (FP4) or int32 (INT4).

    Returns:
        Four operands, `[rows, 64]`, bfloat16 or float16.
    """
    if scales.dtype == tl.uint8:
        if IS_BFLOAT16:
            factors = _factors(scales, _BFLOAT16_SCALES)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _BFLOAT16_CODES,
                "=r,=r,=r,=r,r,r,r",
                [codes, spread(factors, 2, 64)],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            factors = _factors(scales, _FLOAT16_SCALES)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _FLOAT16_CODES,
                "=r,=r,=r,=r,r,r,r",
                [codes, spread(factors, 2, 64)],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        factors, zeros = tl.inline_asm_elementwise(
            _INT4_SCALES,
            "=r,=r,r",
            [scales],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        if IS_BFLOAT16:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _INT4_BFLOAT16_CODES,
                "=r,=r,=r,=r,r,r,r,r,r",
                [codes, spread(factors, 2, 64), spread(zeros, 2, 64)],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _INT4_FLOAT16_CODES,
                "=r,=r,=r,=r,r,r,r,r,r",
                [codes, spread(factors, 2, 64), spread(zeros, 2, 64)],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    return w0, w1, w2, w3


@triton.jit
def _factors(scales, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r", [scales], dtype=tl.uint32, is_pure=True, pack=4
    )

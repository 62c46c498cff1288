"""PTX that decodes codes in registers, as text: what Triton's own operations do in 10 to 22
instructions a weight takes 1.4 (FP8) and 2.2 (half) here.

Each text is applied to a few neighbouring elements at a time. It may mix elements of one such pack
only where they are neighbouring columns, which both layouts it meets have in a thread's hands: the
fragment's, and one of at least that many columns a thread.
"""

from __future__ import annotations

_SPLAT = 0x1111


def _fp8_tables() -> str:
    """Four scale bytes to four pairs of registers, the eight levels of each (`tables.py`)."""
    lines = [".reg .b32 s, d, t;"]
    for i in range(4):
        low, high = f"${i}", f"${4 + i}"
        lines += [
            f"prmt.b32 s, $8, 0, {_SPLAT * i:#x};",
            "shr.u32 d, s, 7;",  # 1 in a byte where two thirds are a subtraction of 4, not 5
            f"and.b32 {low}, s, 0x7F7F7F00;",
            "and.b32 t, d, 0x00010100;",
            f"add.u32 {low}, {low}, t;",
            f"sub.u32 {low}, {low}, 0x10151D00;",  # 1.5, 1, 0.5 and 0 of 6
            f"and.b32 {high}, s, 0x7F7F7F7F;",
            "and.b32 t, d, 0x00010001;",
            f"add.u32 {high}, {high}, t;",
            f"sub.u32 {high}, {high}, 0x0005080D;",  # 6, 4, 3 and 2 of 6
        ]
    return "{ " + "\n".join(lines) + " }"


FP8_TABLES = _fp8_tables()
"""uint8 in packs of 4 -> two uint32: the bytes of levels 0 to 3 and 4 to 7."""

FP8_CODES = """{
.reg .b32 m, p, t;
and.b32 m, $2, 0x77777777;
prmt.b32 p, $3, $7, m;
lop3.b32 $0, $2, 0x80808080, p, 0xEA;
shr.u32 m, m, 16;
prmt.b32 p, $3, $7, m;
shl.b32 t, $2, 4;
lop3.b32 $1, t, 0x80808080, p, 0xEA;
}"""
"""A word of 8 codes as uint8 in a pack of 4, both halves of its table -> two float8e4nv.

lop3 with 0xEA is (a & b) | c.
"""


def _half_scales(shift: int, more: int) -> str:
    """Four scale bytes to four registers, each the scale twice."""
    lines = [".reg .b32 s;"]
    for i in range(4):
        lines += [
            f"prmt.b32 s, $4, 0, {0x4040 + 0x0101 * i:#x};",
            f"mad.lo.u32 ${i}, s, {1 << shift}, {more * 0x10001};",
        ]
    return "{ " + "\n".join(lines) + " }"


# A code's magnitude bits, read as a float, are the magnitude times 2^-126 (bfloat16) or 2^-14
# (float16). So the scales are made 2^119 or 2^7 times what they are, and products are exact and
# 2^-7 times what they should be.
BFLOAT16_SCALES = _half_scales(4, (127 + 119 - 10) << 7)
"""uint8 in packs of 4 -> uint32, two bfloat16 each."""
FLOAT16_SCALES = _half_scales(7, (15 + 7 - 10) << 10)
"""uint8 in packs of 4 -> uint32, two float16 each."""

BFLOAT16_CODES = """{
.reg .b32 a, b;
and.b32 a, $4, 0x81C081C0;
mul.rn.bf16x2 $0, a, $5;
shl.b32 a, $4, 3;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $1, a, $5;
shl.b32 a, $4, 6;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $2, a, $5;
shl.b32 a, $4, 1;
and.b32 a, a, 0x80008000;
shr.u32 b, $4, 4;
lop3.b32 a, b, 0x00C000C0, a, 0xEA;
shr.u32 b, $4, 5;
lop3.b32 a, b, 0x01000100, a, 0xEA;
mul.rn.bf16x2 $3, a, $5;
}"""
"""Four codes an element, uint16 in packs of 2, the scales -> four bfloat16."""

FLOAT16_CODES = """{
.reg .b32 a, b;
and.b32 a, $4, 0x8E008E00;
mul.rn.f16x2 $0, a, $5;
shl.b32 a, $4, 3;
and.b32 a, a, 0x8E008E00;
mul.rn.f16x2 $1, a, $5;
shl.b32 a, $4, 6;
and.b32 a, a, 0x0E000E00;
shl.b32 b, $4, 1;
lop3.b32 a, b, 0x80008000, a, 0xEA;
mul.rn.f16x2 $2, a, $5;
shl.b32 a, $4, 9;
and.b32 a, a, 0x0E000E00;
shl.b32 b, $4, 2;
lop3.b32 a, b, 0x80008000, a, 0xEA;
mul.rn.f16x2 $3, a, $5;
}"""
"""The same for float16."""

INT4_SCALES = """{
prmt.b32 $0, $2, 0, 0x1010;
prmt.b32 $1, $2, 0, 0x3232;
}"""
"""uint32, a scale below a zero point -> two uint32, the scale twice and the zero point twice."""


def _int4_codes(one: int, kind: str) -> str:
    """Codes become low mantissa bits of a power of two; the zero point holds the same power."""
    # The power in a register: LOP3 takes one constant, and would become two instructions.
    lines = [".reg .b32 a, s, one;", f"mov.b32 one, {one * 0x10001:#x};"]
    for j in range(4):
        source = "$4"
        if j:
            lines.append(f"shr.u32 s, $4, {4 * j};")
            source = "s"
        lines += [
            f"lop3.b32 a, {source}, 0x000F000F, one, 0xEA;",
            f"sub.rn.{kind}x2 a, a, $7;",
            f"mul.rn.{kind}x2 ${j}, a, $5;",
        ]
    return "{ " + "\n".join(lines) + " }"


INT4_BFLOAT16_CODES = _int4_codes(0x4300, "bf16")
"""Four codes an element, uint16 in packs of 2, scales, zero points -> four bfloat16."""
INT4_FLOAT16_CODES = _int4_codes(0x6400, "f16")
"""The same for float16."""

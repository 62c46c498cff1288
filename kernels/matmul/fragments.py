"""How codes and scales lie in memory for the Triton kernels: in the order of tensor-core fragments.

A thread of a warpgroup that multiplies 64 rows holds, of each row, what its place t in a group of
four threads (t = 0..3) says. The sum over columns does not care for their order as long as both
operands have the same, so columns are ordered for the weight's sake: of each block of 256, thread t
takes columns 64 t to 64 t + 63. Then a group's scale is used by one thread (by four neighbouring
columns' owners otherwise), and codes go from shared memory into registers as they are stored,
decoded where they are multiplied: 0.5 bytes of shared memory a weight are read, not 3 to 5.

A block is stored for 64 rows, codes `[64, 128]` bytes and scales `[64, 4, per_thread]`, so that a
program reads whole lines. Rows are padded to 64 and columns to 256, with codes of weight 0.

FP8 (`fp8`): 8 codes in a 32-bit word, column 64 t + 16 i + 8 h + c, word (i, h, t). Bits 4c to
4c + 2 are the magnitude of code c (what PRMT selects by), the signs of codes 0 to 3 are bits 7, 15,
23, 31, and those of 4 to 7 bits 3, 11, 19, 27. Codes 0 to 3 are the first operand, 4 to 7 the
second.

Half (`bfloat16`, `float16`, `int4-...`): 4 codes in 16 bits, column 64 t + 16 i + 8 h + 2 j + c,
element (i, h, t, c), code j; each j is an operand. A code's bits lie where a shift takes most of
them to their place in the float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from trimtab.kernels.formats import Packed
from trimtab.kernels.formats.grid import row_chunks
from trimtab.kernels.matmul import tables
from trimtab.kernels.matmul.reference import rows_of

ROWS = 64
COLUMNS = 256
THREADS = 4
_EACH = COLUMNS // THREADS  # columns of a thread

Scheme = Literal["fp8", "bfloat16", "float16", "int4-bfloat16", "int4-float16"]
"""What codes are decoded to, and how; `int4-` codes are affine, the others E2M1."""

_HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Where the three magnitude bits of code j go as they are, and the sign, in 16 bits.
_PLACES: dict[str, tuple[tuple[int, int], ...]] = {
    "bfloat16": ((6, 15), (3, 12), (0, 9)),
    "float16": ((9, 15), (6, 12), (3, 14), (0, 13)),
}
# A half's scale is a byte of five exponent bits and three mantissa bits: 0 is 2^-10. NVFP4's scales
# are 2^-9 to 448, and fit as they are.
_LEAST_EXPONENT, _EXPONENTS = -10, 19
# Codes of half kernels come out 2^7 times smaller than they are, to stay in float16's range.
_AFTER = 2.0**7
_INT4_ONE = {"int4-bfloat16": 128.0, "int4-float16": 1024.0}
"""Codes of INT4 become the low bits of the mantissa of this."""


@dataclass(frozen=True, eq=False)
class Fragments:
    """A matrix as the kernels read it.

    Attributes:
        scheme: what the codes are decoded to.
        shape: of the matrix, `(n_out, n_in)`.
        codes: `[n_out / 64, n_in / 256, 64, 128]`, uint8.
        scales: `[n_out / 64, n_in / 256, 64, threads, per_thread]`: uint8 tops (`fp8`) or scales
            (half), or int32, INT4's scale in the low half and what is subtracted in the high one.
        rows: `[n_out]`, float32, multiplies the sums.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    rows: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scales.nbytes + self.rows.nbytes

    @classmethod
    def of(cls, packed: Packed, *, scheme: Scheme, device: torch.device) -> Fragments:
        """Lay a matrix out; rows are worked on some at a time.

        Args:
            packed: a matrix that `takes` says yes to.
            scheme: what its codes become.
            device: where the fragments are wanted.
        """
        n_out, n_in = packed.shape
        blocks = (_up(n_out, ROWS), _up(n_in, COLUMNS))
        codes = torch.empty(*blocks, ROWS, COLUMNS // 2, dtype=torch.uint8, device=device)
        threads, each = _spread(packed)
        kind = torch.int32 if scheme.startswith("int4") else torch.uint8
        scales = torch.empty(*blocks, ROWS, threads, each, dtype=kind, device=device)
        rows = torch.empty(n_out, dtype=torch.float32, device=device)
        for some in row_chunks(blocks[0], ROWS * n_in):
            which = slice(some.start * ROWS, min(some.stop * ROWS, n_out))
            part = rows_of(packed, which).to(device)
            codes[some], scales[some], rows[which] = _laid_out(part, scheme)
        return cls(scheme, packed.shape, codes, scales, rows)


def takes(packed: Packed) -> bool:
    """Whether the matrix has a layout of fragments: groups of a multiple of 16, for INT4 of 32."""
    return packed.group_size % (32 if packed.codebook.name == "uint4" else 16) == 0


def scheme_of(packed: Packed, *, dtype: torch.dtype, is_fp8: bool) -> Scheme:
    """Return what a matrix's codes become for activations of a dtype.

    Raises:
        ValueError: a dtype that tensor cores do not multiply.
    """
    if dtype not in _HALF:
        raise ValueError(f"{dtype} activations; the kernels take {', '.join(map(str, _HALF))}")
    if is_fp8:
        return "fp8"
    name = _HALF[dtype]
    return f"int4-{name}" if packed.codebook.name == "uint4" else name  # type: ignore[return-value]


def column_order(scheme: Scheme) -> torch.Tensor:
    """Return the column at each place of a block, `[operands, 256 / operands]`, int64."""
    columns = torch.arange(COLUMNS)
    return _operands(columns.view(1, 1, COLUMNS), scheme).reshape(_n_operands(scheme), -1)


def _n_operands(scheme: Scheme) -> int:
    return 2 if scheme == "fp8" else 4


def _operands(blocks: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return `[rows, blocks, 256]` as `[operands, rows, blocks, places]`."""
    n_rows, n_blocks, _ = blocks.shape
    if scheme == "fp8":
        parts = blocks.view(n_rows, n_blocks, THREADS, 4, 2, 2, 4)  # t, i, h, operand, c
        return parts.permute(5, 0, 1, 3, 4, 2, 6).reshape(2, n_rows, n_blocks, -1)
    parts = blocks.view(n_rows, n_blocks, THREADS, 4, 2, 4, 2)  # t, i, h, operand, c
    return parts.permute(5, 0, 1, 3, 4, 2, 6).reshape(4, n_rows, n_blocks, -1)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple)


def _spread(packed: Packed) -> tuple[int, int]:
    """Return how many threads of four store scales of their own, and how many scales each."""
    size = packed.group_size
    if packed.codebook.name == "uint4":
        return (2 if size % 128 == 0 else 4, 1 if size % 64 == 0 else 2)
    return 4, 2 if size % 32 == 0 else 4


def _laid_out(packed: Packed, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_out, n_in = packed.shape
    if scheme == "fp8":
        codes, tops, rows = tables.tops(packed)
        is_flagged = ((tops & 7) >= 3) & ((tops & 7) <= 5)
        scales, idle = tops | (is_flagged.to(torch.uint8) << 7), tables.LEAST
    elif scheme.startswith("int4"):
        codes, scales, rows = _affine(packed, scheme)
        idle = 0
    else:
        codes, scales, rows = _floats(packed)
        idle = 0
    threads, each = _spread(packed)
    size = COLUMNS // (threads * each)
    scales = scales.repeat_interleave(packed.group_size // size, dim=1)
    below, beside = _up(n_out, ROWS) * ROWS - n_out, _up(n_in, COLUMNS) * COLUMNS - n_in
    codes = F.pad(codes, (0, beside, 0, below))
    scales = F.pad(scales, (0, beside // size, 0, below), value=idle)
    blocked = _words(codes.unflatten(1, (-1, COLUMNS)), scheme)
    blocked = blocked.unflatten(0, (-1, ROWS)).transpose(1, 2)
    grouped = scales.view(-1, ROWS, codes.shape[1] // COLUMNS, threads, each).transpose(1, 2)
    return blocked, grouped, rows


def _words(blocks: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return codes `[rows, blocks, 256]` as bytes `[rows, blocks, 128]`."""
    operands = _operands(blocks, scheme)
    if scheme == "fp8":
        first, second = operands
        # Byte b of a word: magnitudes of codes 2b and 2b + 1, signs of codes 4 + b and b.
        word = torch.cat((first.unflatten(-1, (-1, 4)), second.unflatten(-1, (-1, 4))), -1)
        size, sign = word & 7, word >> 3
        low = size[..., 0::2] | (sign[..., 4:] << 3)
        return (low | (size[..., 1::2] << 4) | (sign[..., :4] << 7)).flatten(-2)
    wide = operands.to(torch.int32)
    if scheme.startswith("int4"):
        bits = sum(wide[j] << (4 * j) for j in range(4))
    else:
        size, sign = wide & 7, wide >> 3
        places = _PLACES[scheme]
        bits = sum((size[j] << at) | (sign[j] << to) for j, (at, to) in enumerate(places))
        if len(places) == 3:  # what is left over in bfloat16: bits 14, 13, 11 and 10
            bits = bits | (sign[3] << 14) | (size[3] >> 2 << 13) | ((size[3] & 3) << 10)
    assert isinstance(bits, torch.Tensor)
    return torch.stack((bits & 255, bits >> 8), -1).to(torch.uint8).flatten(-2)


def _floats(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scale bytes and rows of an FP4 matrix for half kernels."""
    scales = tables.Scales.of(packed)
    # NVFP4's exponents fit; a row of powers of two is moved so that its largest fits, and what is
    # 2^-19 of it and less becomes 0.
    highest = scales.exponents.amax(1).clamp(min=-(1 << 9))
    shift = _LEAST_EXPONENT + _EXPONENTS - 1 - highest
    exponents = scales.exponents + shift.unsqueeze(1) - _LEAST_EXPONENT
    is_gone = (exponents < 0) | scales.is_zero
    codes = packed.codes().unflatten(1, (-1, packed.group_size))
    codes = codes.masked_fill(is_gone.unsqueeze(-1), 0).flatten(1)
    stored = (exponents.clamp(min=0) << 3) | scales.mantissas
    return codes, stored.to(torch.uint8), torch.ldexp(scales.rows * _AFTER, -shift)


def _affine(packed: Packed, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales with zero points, and rows, all 1, of an INT4 matrix."""
    dtype = torch.bfloat16 if scheme.endswith("bfloat16") else torch.float16
    step, grid = packed.parts.steps(), packed.grid()
    zero = torch.full_like(step, packed.codebook.zero) if grid.zero is None else grid.zero
    # Scales are relative to their row's largest, so that float16 holds them whatever they are.
    fraction, exponent = torch.frexp(step.amax(1))
    rows = torch.ldexp(torch.ones_like(fraction), exponent)
    low = (step / rows.unsqueeze(1)).to(dtype).view(torch.int16).int() & 0xFFFF
    high = (zero + _INT4_ONE[scheme]).to(dtype).view(torch.int16).int()
    return packed.codes(), low | (high << 16), rows

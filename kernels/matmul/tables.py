"""FP4 weights as FP8: eight E4M3 levels for each group, made from one byte.

Tensor cores multiply FP8 by FP8, so a code q and its group's scale must become one E4M3 number
before the product (a scale after it would cost as much as the product). A group's byte is its
*top*, the E4M3 number that code 7, the magnitude 6, stands for; the other levels follow:

    level[q] = E4M3(top * magnitude[q] / 6),    weight = level * row

Magnitudes 6, 3 and 1.5 are the top and its halves, exact. 4, 2, 1 and 0.5 are two thirds of those,
rounded; they are exact where the top is 1.5 * 2^e. So scales that are powers of two (MXFP4, M1, M2)
lose nothing, and NVFP4's lose 1.4 % of a gaussian weight's RMS, where NVFP4 itself loses 9.5 %.

In bytes a halving is a subtraction of 8, and two thirds of a top is a subtraction of 4 where its
mantissa is 3, 4 or 5, of 5 elsewhere. Kernels build their tables so; the law needs all levels
normal, which a row's power of two arranges: its largest top is just below 448, and a group whose
top is below `LEAST`, 1 / 2000 of it, has its codes rounded anew under `LEAST`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.kernels.formats import Packed, e2m1, fp8

LEAST = 36
"""The least top as a byte, 1.5 * 2^-3: its smallest level, 2^-6, is E4M3's least normal number."""
_MANTISSA = 3  # bits
_BIAS = 7
_LARGEST_EXPONENT = 8  # of 448
_OF_SIX = 4  # mantissa of 6 * 2^e


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of FP4 rows, each (1 + mantissa / 8) * 2^exponent.

    Attributes:
        exponents: `[rows, n_groups]`, int32.
        mantissas: `[rows, n_groups]`, int32, 0 to 7.
        is_zero: `[rows, n_groups]`, bool; the group's weights are all 0.
        rows: `[rows]`, float32, multiplies them.
    """

    exponents: torch.Tensor
    mantissas: torch.Tensor
    is_zero: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, packed: Packed) -> Scales:
        """Return the scales of an FP4 matrix.

        Raises:
            ValueError: a matrix that is not FP4.
        """
        if packed.codebook.name != "e2m1":
            raise ValueError(f"{packed.format} is no FP4 format: it has no table of eight levels")
        parts, n_out = packed.parts, packed.shape[0]
        if parts.scales.dtype == torch.uint8:
            exponents = parts.scales.int() - 127
            mantissas, is_zero = torch.zeros_like(exponents), torch.zeros_like(exponents).bool()
        else:
            fraction, exponents = torch.frexp(parts.scales.float())
            is_zero = fraction == 0
            mantissas = torch.where(is_zero, 0, (fraction * 16).int() - 8)
            exponents = torch.where(is_zero, -(1 << 10), exponents.int() - 1)
        rows = torch.ones(n_out, device=packed.device)
        for factor in (parts.tensor_scale, parts.row_scale):
            rows = rows if factor is None else rows * factor
        return cls(exponents, mantissas, is_zero, rows)


def tops(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an FP4 matrix in the form of tables.

    Args:
        packed: an FP4 matrix.

    Returns:
        Codes `[n_out, n_in]`, uint8; tops `[n_out, n_groups]`, uint8, `LEAST` to 126; rows
        `[n_out]`, float32.

    Raises:
        ValueError: a matrix that is not FP4.
    """
    scales = Scales.of(packed)
    exponents, mantissas = scales.exponents, scales.mantissas
    # A row whose scales are all powers of two has tops 6 * 2^e, and no level is rounded.
    is_power = (mantissas == 0).all(1)
    largest = ((exponents << _MANTISSA) + mantissas).amax(1)
    highest = largest >> _MANTISSA
    # 448 is 1.75 * 2^8: a mantissa of 7 ends an octave below it.
    shift = _LARGEST_EXPONENT - highest - (largest & 7 == 7).int()
    shift = torch.where(is_power, _LARGEST_EXPONENT - highest, shift)
    mantissas = torch.where(is_power.unsqueeze(1), _OF_SIX, mantissas)
    wanted = ((exponents + shift.unsqueeze(1) + _BIAS) << _MANTISSA) + mantissas
    rows = torch.ldexp(scales.rows, -shift) * torch.where(is_power, 4.0, 6.0)

    codes = packed.codes()
    is_small = wanted < LEAST
    if is_small.any():
        # How many times LEAST, 1.5 * 2^-3, the tops would be.
        fraction = 1 + mantissas.float() / 8
        units = torch.ldexp(fraction, exponents + shift.unsqueeze(1)) / 0.1875
        units = torch.where(scales.is_zero, 0.0, units)
        row, group = is_small.nonzero(as_tuple=True)
        grouped = codes.unflatten(1, (-1, packed.group_size))
        values = e2m1.decode(grouped[row, group]) * units[row, group].unsqueeze(1)
        grouped[row, group] = e2m1.nearest(values)
    return codes, wanted.clamp(min=LEAST).to(torch.uint8), rows


def levels(tops: torch.Tensor) -> torch.Tensor:
    """Return the eight levels of each top, `[..., 8]`, float8_e4m3fn, for tops `[...]`, uint8."""
    magnitudes = torch.tensor(e2m1.MAGNITUDES, device=tops.device)
    # The quotient is rounded in float32 first; no exact third or sixth lies near a tie of E4M3.
    return (tops.view(fp8.DTYPE).float().unsqueeze(-1) * (magnitudes / 6)).to(fp8.DTYPE)


def dequantize(codes: torch.Tensor, tops: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the weights that W4A8 computes with.

    Args:
        codes: `[n_out, n_in]`, uint8.
        tops: `[n_out, n_groups]`, uint8.
        rows: `[n_out]`, float32.

    Returns:
        `[n_out, n_in]`, float32.
    """
    grouped = codes.unflatten(1, (tops.shape[1], -1)).long()
    sizes = levels(tops).float().gather(2, grouped & 7)
    signed = torch.where(grouped >= 8, -sizes, sizes).flatten(1)
    return signed * rows.unsqueeze(1)

"""4-bit and 8-bit formats of weights: levels, scales, rounding, packing. Plain torch."""

from trimtab.kernels.formats.codebook import Codebook
from trimtab.kernels.formats.format import Format
from trimtab.kernels.formats.fp8 import Fp8Matrix
from trimtab.kernels.formats.grid import Grid
from trimtab.kernels.formats.packed import Packed
from trimtab.kernels.formats.parts import Parts
from trimtab.kernels.formats.registry import FORMATS, format_named

__all__ = ["FORMATS", "Codebook", "Format", "Fp8Matrix", "Grid", "Packed", "Parts", "format_named"]

"""How one matrix becomes four bits: rounding, clipping, error feedback, what the rest can mend."""

from trimtab.kernels.quantize.awq import AwqChoice, awq_scale, clip, search_scale
from trimtab.kernels.quantize.descent import descend
from trimtab.kernels.quantize.gptq import gptq
from trimtab.kernels.quantize.lorc import lorc
from trimtab.kernels.quantize.rounding import mse, rtn

__all__ = [
    "AwqChoice",
    "awq_scale",
    "clip",
    "descend",
    "gptq",
    "lorc",
    "mse",
    "rtn",
    "search_scale",
]

"""The schemes and methods by name. Imports no torch, so that a help page is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """What is stored and what is computed with.

    Attributes:
        format: of the weights, a name in `kernels.formats`.
        activations: `same` as the model's, or `fp8`: E4M3, a scale a token.
        description: one sentence for people.
    """

    format: str
    activations: Literal["same", "fp8"]
    description: str


SCHEMES = {
    "nvfp4": Scheme("nvfp4", "same", "E2M1 in groups of 16 with E4M3 scales, 4.5 bits a weight."),
    "w4a8": Scheme("nvfp4", "fp8", "NVFP4 weights, activations in FP8 with a scale a token."),
    "mxfp4": Scheme(
        "mxfp4", "same", "E2M1 in groups of 32 with powers of two, 4.25 bits a weight."
    ),
    "int4": Scheme("int4", "same", "Integers in groups of 128 (or 64, 32), 4.125 bits a weight."),
}
METHODS = {
    "rtn": "Round to nearest.",
    "mse": "Scales by the least squared error, weighted by what the inputs are.",
    "awq": "Make important columns larger before rounding (AWQ), clip the rest.",
    "gptq": "Error feedback column by column (GPTQ), then descent over single weights.",
    "awq+gptq": "AWQ's scales, then GPTQ.",
    "zeroquant-fp": "GPTQ under scales that are powers of two apart, which FP8 multiplies exactly.",
}
DEFAULT_METHOD = "gptq"

"""What a quantised model is made by: scheme, method, what is kept. Checked before a model loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal

from trimtab.kernels.formats import Format, format_named
from trimtab.steering.errors import DataError, did_you_mean, listed
from trimtab.training.quantization.schemes import DEFAULT_METHOD, METHODS, SCHEMES

Precision = Literal["4-bit", "fp8", "kept"]


_INT4_GROUPS = (128, 64, 32)
_KEPT_AS: dict[str, Precision] = {"fp8": "fp8", "bf16": "kept"}


@dataclass(frozen=True)
class QuantizeSettings:
    """Everything that decides which numbers come out, the model and the text aside.

    Attributes:
        scheme: a name in `SCHEMES`.
        method: a name in `METHODS`.
        group_size: columns that share a scale; None means the format's own, and for int4 the
            largest of 128, 64 and 32 that divides every matrix.
        lorc: rank of the low-rank correction beside each matrix; 0 is none.
        keep: (pattern, precision): linears whose name ends in the pattern, where * stands for
            anything, are kept in `fp8` or `bf16`.
        mixed: average bits a weight that may be spent, by raising the most sensitive linears to
            fp8; None spends none.
        damping: GPTQ's, as a share of the Hessian's mean diagonal.
        n_sweeps: of coordinate descent behind GPTQ.
    """

    scheme: str = "nvfp4"
    method: str = DEFAULT_METHOD
    group_size: int | None = None
    lorc: int = 0
    keep: tuple[tuple[str, str], ...] = ()
    mixed: float | None = None
    damping: float = 0.01
    n_sweeps: int = 4

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            DataError: an unknown scheme, method or precision, or a group size the format lacks.
        """
        if self.scheme not in SCHEMES:
            raise DataError(
                f"{self.scheme!r} is no scheme.{did_you_mean(self.scheme, SCHEMES)} "
                f"Allowed: {listed(SCHEMES)}."
            )
        if self.method not in METHODS:
            raise DataError(
                f"{self.method!r} is no method.{did_you_mean(self.method, METHODS)} "
                f"Allowed: {listed(METHODS)}."
            )
        if self.method == "zeroquant-fp" and self.scheme == "int4":
            raise DataError(
                "zeroquant-fp rounds to floating point and int4 has none: choose nvfp4, w4a8 or "
                "mxfp4, or another method."
            )
        for pattern, precision in self.keep:
            if precision not in _KEPT_AS:
                raise DataError(
                    f"{pattern}={precision}: a linear can be kept in {listed(_KEPT_AS)}."
                )
        if self.lorc < 0:
            raise DataError(f"A correction of rank {self.lorc} is none; 0 leaves it out.")
        if self.mixed is not None and not 4 <= self.mixed <= 8.5:
            raise DataError(
                f"{self.mixed} bits a weight cannot be mixed of four and eight; allowed: 4 to 8.5."
            )
        try:
            self.format_for((0,))
        except ValueError as error:
            raise DataError(f"{error}.") from None

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads the linears' inputs."""
        return self.method != "rtn" or self.lorc > 0 or self.mixed is not None

    @property
    def is_feedback(self) -> bool:
        """Whether the method spreads rounding errors over columns."""
        return self.method in ("gptq", "awq+gptq", "zeroquant-fp")

    @property
    def activations(self) -> Literal["same", "fp8"]:
        """What a quantised linear's inputs are rounded to."""
        return SCHEMES[self.scheme].activations

    def format_for(self, widths: tuple[int, ...]) -> Format:
        """Return the format of a model's weights.

        Args:
            widths: every matrix's n_in.

        Raises:
            ValueError: the format has no groups of the size asked for.
        """
        name = SCHEMES[self.scheme].format
        if self.method == "zeroquant-fp" and name == "nvfp4":
            name = "fp4-m2"
        size = self.group_size
        if size is None and name == "int4":
            whole = [g for g in _INT4_GROUPS if all(width % g == 0 for width in widths)]
            size = whole[0] if whole else _INT4_GROUPS[-1]
        return format_named(name, group_size=size)

    def kept(self, name: str) -> Precision:
        """Return what `keep` says of a linear, by its full name in the model."""
        for pattern, precision in self.keep:
            if fnmatchcase(name, f"*{pattern}"):
                return _KEPT_AS[precision]
        return "4-bit"

    @property
    def digest(self) -> str:
        """SHA-256 of all settings in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

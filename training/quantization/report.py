"""What quantisation did: bits, bytes, perplexity before and after, and each linear's error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.kernels.formats import Fp8Matrix
from trimtab.training.quantization.layer_result import LayerResult


@dataclass(frozen=True)
class LinearReport:
    """One linear.

    Attributes:
        name: in the model.
        format: what it is stored in.
        n_weights: in it.
        bits: a weight, scales and correction included.
        weight_error: |W - W'| / |W|.
        output_error: the same of its outputs on the calibration text, or None.
    """

    name: str
    format: str
    n_weights: int
    bits: float
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """The whole model.

    Attributes:
        scheme, method, calibration: what was done, on what.
        bits: a weight of the quantised linears.
        n_quantized, n_kept: linears.
        coverage: the quantised linears' share of all weights in the decoder layers; what is missing
            are kept linears, norms, and matrices that are no nn.Linear, such as fused experts.
        kept: name -> why it stayed as it is.
        balanced: norms and linears that AWQ's scales were folded into -> exponent.
        bytes_before, bytes_after: of the weights files.
        nll_before, nll_after: nats a token on `measured_on`; None where nothing was measured.
        measured_on: what text.
        linears: each quantised linear.
    """

    scheme: str
    method: str
    calibration: str | None
    bits: float
    n_quantized: int
    n_kept: int
    coverage: float
    kept: dict[str, str]
    balanced: dict[str, float]
    bytes_before: int
    bytes_after: int
    nll_before: float | None
    nll_after: float | None
    measured_on: str | None
    linears: tuple[LinearReport, ...]

    @property
    def perplexity_before(self) -> float | None:
        """The original's perplexity."""
        return None if self.nll_before is None else math.exp(self.nll_before)

    @property
    def perplexity_after(self) -> float | None:
        """The quantised model's."""
        return None if self.nll_after is None else math.exp(self.nll_after)

    def to_json(self) -> dict[str, Any]:
        """Return everything, fit for JSON."""
        own = asdict(self)
        own["perplexity_before"] = self.perplexity_before
        own["perplexity_after"] = self.perplexity_after
        return own

    def summary(self) -> dict[str, Any]:
        """Return what the quantised folder says of itself: all but the single linears."""
        return {k: v for k, v in self.to_json().items() if k not in ("linears", "kept", "balanced")}


def linear_reports(results: Sequence[LayerResult]) -> list[LinearReport]:
    """Return the report of every quantised linear of these layers."""
    found = []
    for result in results:
        for name, quantized in result.linears.items():
            matrix = quantized.matrix
            n_out, n_in = matrix.shape
            n_bytes = matrix.n_bytes
            if quantized.factors is not None:
                n_bytes += sum(f.numel() * f.element_size() for f in quantized.factors)
            found.append(
                LinearReport(
                    name=f"{result.name}.{name}",
                    format="fp8" if isinstance(matrix, Fp8Matrix) else matrix.format,
                    n_weights=n_out * n_in,
                    bits=8 * n_bytes / (n_out * n_in),
                    weight_error=quantized.weight_error,
                    output_error=quantized.output_error,
                )
            )
    return found

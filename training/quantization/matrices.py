"""Quantise linears that read the same input, and measure what each of them lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.kernels.formats import Format, Fp8Matrix, Grid, Packed
from trimtab.kernels.formats.fp8 import quantize_matrix
from trimtab.kernels.formats.recast import as_nvfp4
from trimtab.kernels.matmul import Activations, PreparedWeight, prepare, reference
from trimtab.kernels.quantize import clip, descend, gptq, lorc
from trimtab.steering.model.quantized.fp8_weight import Fp8Weight
from trimtab.steering.model.quantized.linear import QuantizedLinear
from trimtab.training.quantization.linear_inputs import LinearInputs
from trimtab.training.quantization.settings import Precision, QuantizeSettings

# What is multiplied with one another afterwards is not clipped, as in llm-awq: products of queries
# and keys are too delicate for a criterion that looks at either alone.
_QUERIES_AND_KEYS = ("q_", "k_", "query", "key", "wqkv")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A linear after quantisation.

    Attributes:
        matrix: what is stored.
        factors: LoRC's A `[n_out, rank]` and B `[rank, n_in]`, bfloat16, or None.
        weight_error: |W - W'| / |W|, with the correction, Frobenius.
        output_error: the same of the outputs on the calibration text; None without one.
    """

    matrix: Packed | Fp8Matrix
    factors: tuple[torch.Tensor, torch.Tensor] | None
    weight_error: float
    output_error: float | None

    def put_into(self, layer: nn.Module, name: str, activations: Activations) -> None:
        """Make a layer compute as it will when the quantised folder is served.

        Args:
            layer: changed in place.
            name: of the linear in it.
            activations: what the linear's inputs are rounded to.
        """
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        device, dtype = linear.weight.device, linear.weight.dtype
        matrix = self.matrix.to(device)
        if activations == "same" and self.factors is None:
            linear.weight.data.copy_(matrix.dequantize())
            return
        served = QuantizedLinear(linear.in_features, linear.out_features, dtype=dtype)
        served.bias = linear.bias
        made: PreparedWeight
        if isinstance(matrix, Fp8Matrix):
            made = Fp8Weight(matrix, device=device, dtype=dtype, activations=activations)
        else:
            made = prepare(matrix, device=device, dtype=dtype, activations=activations)
        served.fill(made, low_rank=self.factors)
        layer.set_submodule(name, served)


def quantize_group(
    weights: Mapping[str, torch.Tensor],
    inputs: LinearInputs | None,
    fmt: Format,
    settings: QuantizeSettings,
    precision: Precision,
) -> dict[str, Quantized]:
    """Quantise linears that read the same input.

    They share what their format has a single one of (NVFP4's tensor scale), because servers
    multiply them as one matrix.

    Args:
        weights: name -> `[n_out, n_in]`; after AWQ's scaling, if any.
        inputs: what they read; None for round to nearest.
        fmt: of 4-bit matrices.
        settings: method, rank of the correction, GPTQ's knobs.
        precision: `4-bit` or `fp8`.
    """
    targets = {name: weight.float() for name, weight in weights.items()}
    made: dict[str, Packed | Fp8Matrix]
    if precision == "fp8":
        made = {name: quantize_matrix(target) for name, target in targets.items()}
    else:
        if settings.method == "awq" and inputs is not None and inputs.n_tokens:
            targets = {
                name: target if _is_query_or_key(name) else clip(target, inputs.sample, fmt)
                for name, target in targets.items()
            }
        shared = _shared_scale(targets.values(), fmt)
        made = {}
        for name, target in targets.items():
            packed = _rounded(target, inputs, fmt, settings, shared)
            # Files know M2 only as the NVFP4 matrix that it also is.
            made[name] = as_nvfp4(packed, tensor_scale=shared) if fmt.has_row_scale else packed
    return {
        name: _measured(weights[name], matrix, inputs, settings if precision == "4-bit" else None)
        for name, matrix in made.items()
    }


def _rounded(
    target: torch.Tensor,
    inputs: LinearInputs | None,
    fmt: Format,
    settings: QuantizeSettings,
    shared: torch.Tensor | None,
) -> Packed:
    is_plain = settings.method in ("rtn", "awq")
    importance = None
    if inputs is not None and inputs.n_tokens and not is_plain:
        importance = inputs.hessian.diagonal()
    grid = fmt.fit(
        target, search="amax" if is_plain else "mse", importance=importance, shared=shared
    )
    return fmt.pack(_codes(target, inputs, grid, fmt, settings), grid)


def _codes(
    target: torch.Tensor,
    inputs: LinearInputs | None,
    grid: Grid,
    fmt: Format,
    settings: QuantizeSettings,
) -> torch.Tensor:
    if not settings.is_feedback or inputs is None or not inputs.n_tokens:
        return grid.encode(target)
    served = _served_levels(grid, fmt) if settings.activations == "fp8" else None
    codes = gptq(target, inputs.hessian, grid, damping=settings.damping, served=served)
    return descend(
        target,
        inputs.hessian,
        grid,
        codes,
        damping=settings.damping,
        n_sweeps=settings.n_sweeps,
        served=served,
    )


def _served_levels(grid: Grid, fmt: Format) -> torch.Tensor | None:
    """Return what W4A8 multiplies codes 0 to 7 as, `[n_out, n_groups, 8]`; None of integers."""
    if grid.codebook.name != "e2m1":
        return None
    levels = []
    for code in range(8):
        packed = fmt.pack(
            torch.full(grid.shape, code, dtype=torch.uint8, device=grid.step.device), grid
        )
        dense = reference.weight(packed, activations="fp8")
        levels.append(dense[:, :: grid.group_size])
    return torch.stack(levels, -1)


def _measured(
    weight: torch.Tensor,
    matrix: Packed | Fp8Matrix,
    inputs: LinearInputs | None,
    settings: QuantizeSettings | None,
) -> Quantized:
    """Add the correction, and compare with the original weight."""
    factors = None
    wide, dense = weight.float(), matrix.dequantize()
    if settings is not None and settings.lorc:
        whitening = None if inputs is None or not inputs.n_tokens else inputs.hessian
        rank = min(settings.lorc, *weight.shape)
        left, right = lorc(wide - dense, rank, whitening=whitening)
        factors = (left.to(torch.bfloat16), right.to(torch.bfloat16))
        dense = dense + factors[0].float() @ factors[1].float()
    lost = wide - dense
    return Quantized(
        matrix=matrix,
        factors=factors,
        weight_error=float(lost.norm() / wide.norm().clamp_min(1e-30)),
        output_error=None
        if inputs is None or not inputs.n_tokens
        else relative_error(wide, lost, inputs.hessian),
    )


def relative_error(weight: torch.Tensor, lost: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return how far the output is off, as a share of its own norm.

    Args:
        weight: `[n_out, n_in]`, float32.
        lost: what is missing from it, the same shape.
        hessian: of the inputs, `[n_in, n_in]`.
    """
    whole = ((weight @ hessian) * weight).sum()
    part = ((lost @ hessian) * lost).sum()
    return float((part.clamp_min(0) / whole.clamp_min(1e-30)).sqrt())


def _shared_scale(weights: Iterable[torch.Tensor], fmt: Format) -> torch.Tensor | None:
    scales = [fmt.shared_scale(weight) for weight in weights]
    known = [scale for scale in scales if scale is not None]
    return torch.stack(known).amax() if known else None


def _is_query_or_key(name: str) -> bool:
    last = name.rsplit(".", 1)[-1].lower()
    return any(last.startswith(word) for word in _QUERIES_AND_KEYS)

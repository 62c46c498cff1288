"""Matrices made ready on a CPU, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.kernels.formats import FORMATS, Packed, format_named
from trimtab.kernels.matmul import prepare, reference
from trimtab.kernels.matmul.dense import DenseWeight
from trimtab.kernels.matmul.int4_cpu import PackedInt4

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def quantized(name: str, group_size: int | None = None, *, n_out: int = 80) -> Packed:
    weight = torch.randn(n_out, 512, generator=torch.Generator().manual_seed(0))
    return format_named(name, group_size=group_size).quantize(weight)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activations", ["same", "fp8"])
def test_products(name: str, dtype: torch.dtype, activations: Any) -> None:
    """What a CPU computes is what the specification says, and so what a GPU does."""
    packed = quantized(name)
    weight = prepare(packed, dtype=dtype, activations=activations)
    x, bias = drawn(2, 3, 512, dtype=dtype), drawn(80, dtype=dtype)
    found = weight(x, bias)
    wanted = reference.matmul(x, packed, activations=activations, bias=bias)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 80)
    assert off(found.float(), wanted) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["int4", "int4-asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_stays_packed(name: str, group_size: int) -> None:
    """Four bits a weight, and the same matrix: torch's kernel counts zero points from 8."""
    packed = quantized(name, group_size)
    weight = prepare(packed, dtype=torch.float32)
    assert isinstance(weight, PackedInt4)
    assert weight.n_bytes <= 80 * 512 * (0.5 + 8 / group_size)
    assert off(weight.dense(), packed.dequantize()) < 1e-6


def test_int4_that_torch_has_no_kernel_for() -> None:
    """Groups of 16, or 17 rows: an error deep in torch, or another matrix."""
    for packed in (quantized("int4", 16), quantized("int4", n_out=17)):
        weight = prepare(packed, dtype=torch.float32)
        assert isinstance(weight, DenseWeight)
        assert torch.equal(weight.dense(), packed.dequantize())


def test_nvfp4_is_exact_in_bfloat16() -> None:
    """Our tensor scales are powers of two, so the dense matrix is no second rounding."""
    packed = quantized("nvfp4")
    weight = prepare(packed)
    assert torch.equal(weight.dense(), packed.dequantize())
    assert weight.n_bytes == 2 * 80 * 512
    weight.dense(torch.bfloat16).zero_()
    assert weight.dense().any()  # a copy


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_nobody_is_there(name: str) -> None:
    """An empty batch is a shape like others."""
    assert prepare(quantized(name))(drawn(0, 512, dtype=torch.bfloat16)).shape == (0, 80)


def test_what_is_not_meant_for_a_weight_is_refused() -> None:
    """A product in the wrong type would convert a matrix at every step, or answer nonsense."""
    packed = quantized("nvfp4")
    weight = prepare(packed)
    with pytest.raises(ValueError, match=r"prepared for \[..., 512\] of torch.bfloat16"):
        weight(drawn(2, 512))
    with pytest.raises(ValueError, match="activations"):
        weight(drawn(2, 256, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bias \(3,\)"):
        weight(drawn(2, 512, dtype=torch.bfloat16), drawn(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"int8' activations; allowed: same, fp8"):
        prepare(packed, activations="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"torch\.float64 activations"):
        prepare(packed, dtype=torch.float64)

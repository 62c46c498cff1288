"""Several matrices as one: when they may be, and that no value changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.kernels.formats import Fp8Matrix, Packed, format_named, fp8
from trimtab.serving.engines.vllm.joined_weights import LowRank, as_one, joined


def matrix(format: str, n_out: int, *, seed: int, size: float = 1.0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(n_out, 128, generator=generator)
    return format_named(format).quantize(weight)


def with_scale(made: Packed, factor: float) -> Packed:
    assert made.tensor_scale is not None
    return replace(made, parts=replace(made.parts, tensor_scale=made.tensor_scale * factor))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4", "int4-asym"])
def test_matrices_of_very_different_sizes_become_one(format: str) -> None:
    """A scale that is rounded when it is stored relative to another's."""
    made = [matrix(format, n, seed=n, size=size) for n, size in ((4, 1.0), (1, 60.0), (3, 0.02))]
    one = as_one(made)
    assert one is not None
    assert torch.equal(one.dequantize(), torch.cat([m.dequantize() for m in made]))


def test_matrices_stay_apart_where_a_scale_would_change() -> None:
    """The largest tensor scale for all: the other matrices' values are a few per cent off."""
    made = [matrix("nvfp4", 4, seed=1), with_scale(matrix("nvfp4", 4, seed=2), 0.7)]
    assert as_one(made) is None
    # A scale beyond 448 under the smaller tensor scale, and below 2^-9 under the larger.
    far = [matrix("nvfp4", 4, seed=1), with_scale(matrix("nvfp4", 4, seed=2), 2.0**-17)]
    assert as_one(far) is None


def test_with_fp8_inputs_scales_are_never_moved() -> None:
    """Levels are rounded to FP8 with their scale: a moved scale is another rounding."""
    far = [matrix("nvfp4", 4, seed=1), matrix("nvfp4", 4, seed=2, size=60.0)]
    assert as_one(far) is not None
    assert as_one(far, activations="fp8") is None
    near = [matrix("nvfp4", 4, seed=1), matrix("nvfp4", 4, seed=1)]
    assert as_one(near, activations="fp8") is not None


def test_fp8_matrices_become_one() -> None:
    """Rows under another row's scale."""
    generator = torch.Generator().manual_seed(3)
    made = [fp8.quantize_matrix(torch.randn(n, 64, generator=generator)) for n in (3, 5)]
    one = as_one(made)
    assert isinstance(one, Fp8Matrix)
    assert torch.equal(one.dequantize(), torch.cat([m.dequantize() for m in made]))


@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_products_meet_whether_joined_or_not(factor: float) -> None:
    """Outputs in another order, a bias added to one part, or factors at another's rows."""
    made = [matrix("nvfp4", 4, seed=1), with_scale(matrix("nvfp4", 6, seed=2), factor)]
    generator = torch.Generator().manual_seed(3)
    x, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 128), (10,)))
    up, down = torch.randn(6, 2, generator=generator), torch.randn(2, 128, generator=generator)
    extra = LowRank(slice(4, 10), up, down)
    weights = joined(made, dtype=torch.float32, activations="same", low_rank=[extra])
    assert len(weights.weights) == (1 if factor == 1.0 else 2)
    dense = torch.cat([m.dequantize() for m in made])
    dense[4:] += up @ down
    torch.testing.assert_close(weights(x, bias), x @ dense.t() + bias)

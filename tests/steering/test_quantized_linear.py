"""The quantised linear layer: its numbers, its gradient, what it shows of itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.kernels.formats import FORMATS, format_named, fp8
from trimtab.kernels.matmul import prepare
from trimtab.steering.model.quantized.fp8_weight import Fp8Weight
from trimtab.steering.model.quantized.linear import QuantizedLinear, exact_products

N_OUT, N_IN = 48, 128


def layer(
    name: str = "nvfp4",
    *,
    activations: str = "same",
    bias: bool = True,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> QuantizedLinear:
    g = torch.Generator().manual_seed(0)
    made = QuantizedLinear(N_IN, N_OUT, bias=bias, dtype=dtype)
    weight = torch.randn(N_OUT, N_IN, generator=g) * 0.1
    low_rank = None
    if rank:
        low_rank = torch.randn(N_OUT, rank, generator=g), torch.randn(rank, N_IN, generator=g)
    fmt = format_named(name, group_size=32 if name.startswith("int4") else None)
    packed = fmt.quantize(weight)
    made.fill(prepare(packed, dtype=dtype, activations=activations), low_rank=low_rank)  # type: ignore[arg-type]
    if made.bias is not None:
        nn.init.normal_(made.bias, generator=g)
    return made.requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, N_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_correction_and_bias_add_up(name: str, rank: int, dtype: torch.dtype) -> None:
    """A factor transposed, or a bias added twice, once by the product and once after it."""
    made, x = layer(name, rank=rank, dtype=dtype), inputs(dtype)
    assert made.bias is not None
    weight = made.weight.double()
    if rank:
        assert made.lorc_a is not None
        assert made.lorc_b is not None
        weight = weight + made.lorc_a.double() @ made.lorc_b.double()
    exact = x.double() @ weight.T + made.bias.double()
    bound = 2e-6 if dtype is torch.float32 else 1e-2
    off = (made(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert off < bound


@pytest.mark.parametrize("activations", ["same", "fp8"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_gradient_is_the_products(name: str, activations: str, rank: int) -> None:
    """Attribution through a layer that gives no gradient, or that of another weight, says nothing.

    Rounded activations count as the identity.
    """
    made = layer(name, activations=activations, rank=rank)
    x = inputs().requires_grad_()
    upstream = torch.randn(3, 5, N_OUT, generator=torch.Generator().manual_seed(2))
    y = made(x)
    torch.testing.assert_close(y, made(x.detach()))
    y.backward(upstream)
    weight = made.weight
    if made.lorc_a is not None and made.lorc_b is not None:
        weight = weight + made.lorc_a @ made.lorc_b
    torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-4, atol=1e-5)


def test_it_looks_like_a_linear_layer() -> None:
    """Tools that read in_features, a bias or a weight's shape find nothing, or an empty one."""
    made = layer(rank=4)
    assert (made.in_features, made.out_features) == (N_IN, N_OUT)
    assert made.weight.shape == (N_OUT, N_IN)
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    assert list(made.state_dict()) == ["bias"]
    assert "128, 48, bias=True" in repr(made)
    assert made.n_bytes > layer().n_bytes
    assert layer(bias=False).bias is None


def test_what_does_not_belong_is_refused() -> None:
    """Factors of another layer, which broadcast or fail in the middle of an answer."""
    made = QuantizedLinear(N_IN, N_OUT)
    with pytest.raises(RuntimeError, match="no weight yet"):
        made(inputs())
    prepared = prepare(FORMATS["nvfp4"].quantize(torch.randn(N_OUT, N_IN)), dtype=torch.float32)
    narrow = prepare(FORMATS["nvfp4"].quantize(torch.randn(N_OUT, 64)), dtype=torch.float32)
    with pytest.raises(ValueError, match="a weight"):
        made.fill(narrow)
    for a, b in (((N_OUT, 2), (3, N_IN)), ((N_IN, 2), (2, N_IN)), ((N_OUT, 2), (2, 64))):
        with pytest.raises(ValueError, match="factors"):
            made.fill(prepared, low_rank=(torch.ones(a), torch.ones(b)))


@pytest.mark.parametrize("activations", ["same", "fp8"])
def test_fp8_weights_are_what_is_stored(activations: str) -> None:
    """An FP8 layer beside 4-bit ones whose activations are rounded when they should not be."""
    matrix = fp8.quantize_matrix(torch.randn(N_OUT, N_IN) * 0.1)
    where = torch.device("cpu")
    weight = Fp8Weight(matrix, device=where, dtype=torch.float32, activations=activations)  # type: ignore[arg-type]
    x = inputs()
    tokens = fp8.rounded_rows(x) if activations == "fp8" else x
    torch.testing.assert_close(weight(x), tokens @ matrix.dequantize().T)
    assert weight.n_bytes == N_OUT * N_IN * 4
    with pytest.raises(ValueError, match="NaN"):
        fp8.quantize_matrix(torch.full((2, 2), torch.nan))


def test_products_are_exact_in_a_block_and_rounded_after_it() -> None:
    """Packing refused because of FP8's rounding, or rounding left off for good."""
    made, x = layer(activations="fp8"), inputs()
    rounded = made(x)
    exact = nn.functional.linear(x, made.weight, made.bias)
    model = nn.Sequential(made, layer("int4"))

    def broken_comparison() -> None:
        with exact_products(model):
            torch.testing.assert_close(made(x), exact)
            torch.testing.assert_close(made(x.clone().requires_grad_()), exact)
            raise KeyError

    with pytest.raises(KeyError):
        broken_comparison()
    assert torch.equal(made(x), rounded)
    assert 0.01 < float((rounded - exact).norm() / exact.norm()) < 0.04

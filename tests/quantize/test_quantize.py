"""Laws of the quantisers: what each of them may never make worse, and when it is another one."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import Format, format_named
from trimtab.kernels.matmul import reference
from trimtab.kernels.quantize import (
    awq_scale,
    clip,
    descend,
    gptq,
    lorc,
    mse,
    rtn,
    search_scale,
)

FORMATS = ("nvfp4", "mxfp4", "fp4-m2", "int4", "int4-asym")
N_OUT, N_IN, N_TOKENS = 48, 128, 2048


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Correlated inputs of very different sizes, `[2048, 128]`, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(N_IN, N_IN, generator=generator) / N_IN**0.5 + torch.eye(N_IN)
    sizes = torch.rand(N_IN, generator=generator).mul(3).exp()
    return torch.randn(N_TOKENS, N_IN, generator=generator) @ mixed * sizes


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N_OUT, N_IN, generator=generator)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def output_error(weight: torch.Tensor, made: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the error of the output, relative to its RMS."""
    want = inputs.double() @ weight.double().T
    return float((inputs.double() @ made.double().T - want).norm() / want.norm())


def fmt_named(name: str) -> Format:
    return format_named(name, group_size=64 if name.startswith("int4") else None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_by_importance", [True, False])
def test_gptq_without_correlations_is_rounding_to_nearest(name, is_by_importance, weight):
    """Catches feedback where there is nothing to feed back, and columns put back in wrong order."""
    grid = fmt_named(name).fit(weight)
    identity = torch.eye(N_IN)
    found = gptq(weight, identity, grid, is_by_importance=is_by_importance)
    assert torch.equal(grid.decode(found), grid.decode(grid.encode(weight)))


@pytest.mark.parametrize("name", FORMATS)
def test_each_step_brings_the_output_closer(name, weight, inputs):
    """Catches a sign or an order gone wrong: the codes would still look like codes."""
    hessian = hessian_of(inputs)
    codes, grid = mse(weight, fmt_named(name), importance=hessian.diagonal())
    nearest = output_error(weight, grid.decode(codes), inputs)
    codes = gptq(weight, hessian, grid)
    fed_back = output_error(weight, grid.decode(codes), inputs)
    codes = descend(weight, hessian, grid, codes, damping=0.0, n_sweeps=3)
    descended = output_error(weight, grid.decode(codes), inputs)
    assert fed_back < 0.93 * nearest
    assert descended < 0.97 * fed_back


def test_descent_never_makes_it_worse_sweep_by_sweep(weight, inputs):
    """Catches a pull that is not brought up to date, which makes later columns move wrongly."""
    hessian = hessian_of(inputs)
    grid = format_named("nvfp4").fit(weight, search="mse")
    codes = grid.encode(weight)
    last = output_error(weight, grid.decode(codes), inputs)
    for _ in range(4):
        codes = descend(weight, hessian, grid, codes, damping=0.0, n_sweeps=1)
        now = output_error(weight, grid.decode(codes), inputs)
        assert now <= last * (1 + 1e-6)
        last = now


def test_columns_that_never_occur_stay_finite(weight, inputs):
    """Catches a division by the zero diagonal of a dead input."""
    dead = inputs.clone()
    dead[:, 5] = 0
    dead[:, 64:80] = 0
    grid = format_named("nvfp4").fit(weight)
    codes = gptq(weight, hessian_of(dead), grid)
    codes = descend(weight, hessian_of(dead), grid, codes)
    made = grid.decode(codes)
    assert torch.isfinite(made).all()
    # Nothing is known of these inputs, so their weights are about what they were.
    assert (made[:, 64:80] - weight[:, 64:80]).norm() < 0.2 * weight[:, 64:80].norm()


def test_a_broken_hessian_is_refused(weight):
    """Catches NaN from a broken activation becoming a model that says nothing of it."""
    grid = format_named("nvfp4").fit(weight)
    broken = torch.eye(N_IN)
    broken[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, broken, grid)
    with pytest.raises(ValueError, match="does not fit"):
        gptq(weight, torch.eye(N_IN + 1), grid)


def test_served_levels_are_what_the_error_counts(weight, inputs):
    """Catches W4A8 codes that were made up for with values nobody multiplies with."""
    fmt = format_named("nvfp4")
    hessian = hessian_of(inputs)
    grid = fmt.fit(weight, search="mse", importance=hessian.diagonal())
    levels = torch.stack(
        [
            reference.weight(
                fmt.pack(torch.full(grid.shape, code, dtype=torch.uint8), grid), activations="fp8"
            )[:, ::16]
            for code in range(8)
        ],
        -1,
    )

    def served(codes: torch.Tensor) -> float:
        made = reference.weight(fmt.pack(codes, grid), activations="fp8")
        return output_error(weight, made, inputs)

    plain = descend(weight, hessian, grid, gptq(weight, hessian, grid))
    aware = gptq(weight, hessian, grid, served=levels)
    aware = descend(weight, hessian, grid, aware, served=levels)
    assert served(aware) < served(plain)


def test_awq_at_exponent_zero_is_rounding_to_nearest(weight, inputs):
    """Catches a scale that is not 1 where the search says to change nothing."""
    assert torch.equal(awq_scale(inputs.abs().mean(0), 0.0), torch.ones(N_IN))


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_awq_is_never_worse_than_rounding(name, weight, inputs):
    """Catches a search whose scaled weights are not scaled back before they are compared."""
    fmt = fmt_named(name)

    def quantize(scaled: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fmt.quantize(scaled).dequantize()

    def loss(made) -> float:
        return output_error(weight, made[0], inputs)

    choice = search_scale([weight], inputs.abs().mean(0), quantize=quantize, loss=loss)
    codes, grid = rtn(weight, fmt)
    assert choice.loss_before == pytest.approx(
        output_error(weight, grid.decode(codes), inputs), rel=1e-6
    )
    assert choice.loss < choice.loss_before


def test_clipping_is_never_worse_within_its_groups(weight, inputs):
    """Catches a bound kept for a group that it makes worse."""
    fmt = fmt_named("int4")
    heavy = weight.clone()
    heavy[:, ::64] *= 6  # an outlier in every group
    codes, grid = rtn(heavy, fmt)
    plain = grid.decode(codes)
    clipped = fmt.quantize(clip(heavy, inputs, fmt)).dequantize()
    tokens = inputs[:: N_TOKENS // 512][:512].view(512, -1, 64)
    lost = [(made - heavy).view(N_OUT, -1, 64) for made in (clipped, plain)]
    ours, theirs = (torch.einsum("tgi,ogi->tog", tokens, part).square().sum(0) for part in lost)
    assert bool((ours <= theirs * (1 + 1e-4)).all())
    assert float(ours.sum()) < float(theirs.sum())


def test_lorc_at_full_rank_is_exact(weight, inputs):
    """Catches a root of the singular values that one factor lacks."""
    codes, grid = rtn(weight, format_named("nvfp4"))
    error = weight - grid.decode(codes)
    for whitening in (None, inputs.square().mean(0).sqrt(), hessian_of(inputs)):
        left, right = lorc(error, N_OUT, whitening=whitening)
        assert (left @ right - error).norm() < 1e-4 * error.norm()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_whitened_lorc_is_never_worse_in_the_output(rank, weight, inputs):
    """Catches whitening on the wrong side, or not undone: plain SVD would be better."""
    codes, grid = rtn(weight, format_named("nvfp4"))
    made = grid.decode(codes)
    errors = []
    for whitening in (None, inputs.square().mean(0).sqrt(), hessian_of(inputs)):
        left, right = lorc(weight - made, rank, whitening=whitening)
        errors.append(output_error(weight, made + left @ right, inputs))
    before = output_error(weight, made, inputs)
    plain, diagonal, whole = errors
    assert whole <= diagonal * (1 + 1e-4)
    assert whole <= plain * (1 + 1e-4)
    assert max(errors) < before


def test_lorc_refuses_what_has_no_sense(weight):
    """Catches a rank of zero that would write empty factors into a file."""
    with pytest.raises(ValueError, match="no correction of rank 0"):
        lorc(weight, 0)
    with pytest.raises(ValueError, match="does not fit"):
        lorc(weight, 4, whitening=torch.ones(3))


def test_lorc_is_whitened_by_fewer_tokens_than_inputs(weight, inputs):
    """Catches a second moment without full rank, of a short text, that ends the whole run."""
    few = inputs[:8].clone()
    few[:, 0] *= 1e4  # one input far above the rest, as in real models
    error = weight - weight.bfloat16().float()
    a, b = lorc(error, 4, whitening=hessian_of(few))
    assert torch.isfinite(a).all()
    assert ((error - a @ b) @ few.T).norm() < (error @ few.T).norm()
    with pytest.raises(ValueError, match="NaN"):
        lorc(error, 4, whitening=torch.full((N_IN, N_IN), torch.nan))

"""The 4-bit formats: scales, rounding, packing, and what they lose."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import FORMATS, Parts, format_named, fp8
from trimtab.kernels.formats import rows as rows_module
from trimtab.kernels.formats.recast import as_mxfp4, as_nvfp4

NAMES = tuple(FORMATS)
FLOATS = ("nvfp4", "mxfp4", "fp4-m1", "fp4-m2")
EDGES = {
    "zeros": torch.zeros(3, 256),
    "one weight": torch.zeros(3, 256).index_put_(
        (torch.tensor(1), torch.tensor(7)), torch.tensor(2.0)
    ),
    "huge": torch.full((2, 256), 3e38).copysign_(torch.randn(2, 256)),
    "dust": torch.randn(2, 256) * 1e-42,
    "far apart": torch.randn(2, 256) * torch.logspace(-30, 30, 256),
    "one sign": torch.rand(2, 256) + 3,
}


def gaussian(n_out: int = 256, n_in: int = 2048, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


def relative_error(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rounded.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("name", "group_size", "search", "percent"),
    [
        ("nvfp4", 16, "amax", 9.51),
        ("nvfp4", 16, "mse", 8.16),
        ("mxfp4", 32, "amax", 11.50),
        ("mxfp4", 32, "mse", 11.16),
        ("fp4-m1", 128, "amax", 12.5),
        ("fp4-m1", 32, "mse", 11.16),
        ("fp4-m2", 16, "mse", 10.96),
        ("fp4-m2", 32, "mse", 11.23),
        ("int4", 128, "amax", 11.74),
        ("int4", 128, "mse", 10.15),
        ("int4", 64, "amax", 10.77),
        ("int4-asym", 128, "amax", 10.06),
        ("int4-asym", 64, "amax", 9.11),
    ],
)
def test_error_on_gaussian_weights(name: str, group_size: int, search: str, percent: float) -> None:
    """A scale that is off by a few percent, or ties rounded one way, shows in the error's norm."""
    weight = gaussian()
    packed = format_named(name, group_size=group_size).quantize(weight, search=search)
    # 1 % of the figure: the spread between seeds is 0.2 %.
    assert relative_error(packed.dequantize(), weight) * 100 == pytest.approx(percent, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_what_codes_and_grid_say(name: str) -> None:
    """A matrix whose rows, groups or halves of bytes are shuffled dequantises to another."""
    fmt = FORMATS[name]
    weight = gaussian(5, 384, seed=1)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = fmt.pack(codes, grid)
    assert packed.shape == (5, 384)
    assert packed.packed.shape == (5, 192)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.grid().decode(codes), grid.decode(codes))
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    group = slice(fmt.group_size, 2 * fmt.group_size)
    levels = fmt.codebook.decode(codes[3, group])
    zero = fmt.codebook.zero if packed.zeros is None else float(packed.zeros[3, 1])
    by_hand = (levels - zero) * float(packed.parts.steps()[3, 1])
    assert torch.equal(packed.dequantize()[3, group], by_hand)
    assert packed.n_bytes == sum(
        t.nbytes for t in (packed.packed, *packed.parts.tensors()) if t is not None
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_weight_becomes_the_nearest_of_its_sixteen(name: str) -> None:
    """A grid that encodes by other levels than it decodes by."""
    weight = gaussian(4, 256, seed=2)
    fmt = FORMATS[name]
    grid = fmt.fit(weight)
    rounded = grid.decode(grid.encode(weight))
    every = torch.stack(
        [grid.decode(torch.full((4, 256), c, dtype=torch.uint8)) for c in range(16)]
    )
    best = (every - weight).abs().amin(0)
    assert torch.allclose((rounded - weight).abs(), best, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_on_the_grid_stays(name: str) -> None:
    """A quantised model that is quantised again by its own grid would drift."""
    fmt = FORMATS[name]
    weight = gaussian(8, 256, seed=3)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    again = grid.decode(codes)
    assert torch.equal(grid.decode(grid.encode(again)), again)
    g = torch.Generator().manual_seed(0)
    stochastic = grid.encode(again, rounding="stochastic", generator=g)
    # Division by a step that is no power of two leaves the last bit open.
    assert relative_error(grid.decode(stochastic), again) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_encoded_as_in_the_whole(name: str) -> None:
    """GPTQ goes by column: with a neighbour's scale it corrects an error that is not there."""
    weight = gaussian(6, 384, seed=4)
    grid = FORMATS[name].fit(weight)
    codes = grid.encode(weight)
    whole = grid.decode(codes)
    for columns in (slice(0, 1), slice(15, 17), slice(100, 333), slice(383, 384), slice(5, 5)):
        part = grid.encode(weight[:, columns], columns=columns)
        assert torch.equal(part, codes[:, columns])
        assert torch.equal(grid.decode(part, columns=columns), whole[:, columns])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["amax", "mse"])
def test_chunks_of_rows_change_nothing(
    name: str, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales relative to a chunk's largest weight instead of the matrix's."""
    weight = gaussian(7, 256, seed=5) * torch.logspace(-2, 1, 7).unsqueeze(1)
    whole = FORMATS[name].quantize(weight, search=search)
    monkeypatch.setattr(rows_module, "CHUNK", 512)
    chunked = FORMATS[name].quantize(weight, search=search)
    assert torch.equal(whole.packed, chunked.packed)
    assert torch.equal(whole.dequantize(), chunked.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_search_never_loses(name: str) -> None:
    """A search that minimises something else than what it says, or forgets the importance."""
    weight = gaussian(16, 512, seed=6)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(7)) ** 4

    def weighted(search: str, by: torch.Tensor | None) -> torch.Tensor:
        packed = FORMATS[name].quantize(weight, search=search, importance=by)
        off = (packed.dequantize() - weight).square() * importance
        return off.unflatten(1, (-1, FORMATS[name].group_size)).sum(-1)

    plain, blind, seeing = (
        weighted("amax", None),
        weighted("mse", None),
        weighted("mse", importance),
    )
    assert (seeing <= plain * (1 + 1e-5)).all()
    assert (seeing <= blind * (1 + 1e-5)).all()
    assert seeing.sum() < 0.97 * plain.sum()
    assert seeing.sum() < 0.995 * blind.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["amax", "mse"])
@pytest.mark.parametrize("edge", EDGES)
def test_extreme_weights_stay_finite_and_near(name: str, search: str, edge: str) -> None:
    """Zero groups, subnormal scales and overflow: 0 / 0, 1 / 0 and inf - inf all give NaN."""
    weight = EDGES[edge]
    packed = FORMATS[name].quantize(weight, search=search)
    rounded = packed.dequantize()
    assert torch.isfinite(rounded).all()
    assert (rounded[weight == 0] == 0).all()
    steps = packed.parts.steps()
    assert (steps > 0).all()
    assert torch.isfinite(steps).all()
    largest = weight.abs().unflatten(1, (-1, FORMATS[name].group_size)).amax(-1)
    off = (rounded / 2 - weight / 2).abs().unflatten(1, (-1, FORMATS[name].group_size)).amax(-1)
    # Half a step between E2M1's last levels, or what saturating clips, against the largest weight;
    # and no format has a step below its own least, relative to the matrix where it is shared.
    least = float(weight.abs().amax()) * 2**-14 + 2.0**-126
    assert (off * 2 <= largest * 0.45 + least).all()


@pytest.mark.parametrize("name", FLOATS)
def test_float_formats_are_exact_in_bfloat16(name: str) -> None:
    """A tensor scale with a full mantissa makes W4A16 in bfloat16 round each weight again."""
    packed = FORMATS[name].quantize(gaussian(64, 512, seed=8) * 0.02, search="mse")
    assert torch.equal(packed.dequantize(torch.bfloat16).float(), packed.dequantize())
    assert torch.equal(packed.dequantize(torch.float16).float(), packed.dequantize())


def test_nvfp4_uses_the_scales_range() -> None:
    """A tensor scale two octaves off saturates the largest blocks or makes the small subnormal."""
    for size in (1e-25, 1e-3, 1.0, 2688.0, 1e30):
        packed = FORMATS["nvfp4"].quantize(gaussian(8, 64, seed=9) * size)
        assert packed.tensor_scale is not None
        assert float(torch.frexp(packed.tensor_scale)[0]) == 0.5
        assert 208 <= float(packed.scales.float().amax()) <= 448


@pytest.mark.parametrize("search", ["amax", "mse"])
def test_m2_is_a_row_scale_and_powers_of_two_in_fp8s_reach(search: str) -> None:
    """A group scale that is not a row's times 2^-k, k <= 11, cannot be an exponent add in FP8."""
    weight = gaussian(32, 512, seed=10) * torch.logspace(-3, 0, 512)
    packed = FORMATS["fp4-m2"].quantize(weight, search=search)
    assert packed.row_scale is not None
    halvings = 127 - packed.scales.int()
    assert (halvings >= 0).all()
    assert (halvings <= 11).all()
    levels = FORMATS["fp4-m2"].codebook.decode(packed.codes())
    product = levels.unflatten(1, (-1, 16)) * torch.ldexp(
        torch.ones(32, 32), 5 - halvings
    ).unsqueeze(-1)
    assert torch.equal(product.to(fp8.DTYPE).float(), product)
    # Four significant bits: the row's scale is an E4M3 number times a power of two.
    mantissa = torch.frexp(packed.row_scale)[0] * 16
    assert torch.equal(mantissa, mantissa.round())


def test_m1_clips_nothing_and_is_the_least_such_power() -> None:
    """ceil and floor confused: half of the groups clipped, or a bit wasted in all."""
    weight = gaussian(16, 512, seed=11)
    steps = FORMATS["fp4-m1"].fit(weight).step
    largest = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    assert (largest <= 6 * steps).all()
    assert (largest > 3 * steps).all()


def test_int4_has_exact_zeros() -> None:
    """Pruned weights that come back as a tenth of a step each add up over a row."""
    weight = torch.where(gaussian(8, 256, seed=12) > 0, gaussian(8, 256, seed=13) + 5, 0.0)
    for name in ("int4", "int4-asym"):
        assert (FORMATS[name].quantize(weight, search="mse").dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nvfp4", 4.5), ("mxfp4", 4.25), ("fp4-m1", 4.25), ("int4", 4.125), ("int4-asym", 4.15625)],
)
def test_bits_count_the_scales(name: str, bits: float) -> None:
    """A report that leaves out the scales says 4 bits for all."""
    assert FORMATS[name].bits((1024, 4096)) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_weight_is_refused(name: str, bad: float) -> None:
    """NaN becomes some code, and a broken checkpoint a model that merely sounds odd."""
    weight = gaussian(4, 256)
    weight[3, 200] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        FORMATS[name].fit(weight)


def test_refusals() -> None:
    """A ragged last group, an unknown word or a wrong type taken silently."""
    fmt = FORMATS["nvfp4"]
    weight = gaussian(4, 64)
    grid = fmt.fit(weight)
    for call, says in (
        (lambda: fmt.fit(gaussian(4, 40)), "no multiple of the group of 16"),
        (lambda: fmt.fit(weight[0]), "filled matrix"),
        (lambda: fmt.fit(weight[:0]), "filled matrix"),
        (lambda: fmt.fit(weight.int()), "floating point"),
        (lambda: fmt.fit(weight, search="best"), "amax, mse"),  # type: ignore[arg-type]
        (lambda: fmt.fit(weight, importance=torch.ones(63)), "importance"),
        (lambda: fmt.fit(weight, importance=-torch.ones(64)), "not negative"),
        (lambda: grid.encode(weight, rounding="up"), "nearest, stochastic"),  # type: ignore[arg-type]
        (lambda: grid.encode(weight, columns=slice(0, 8)), "columns 0 to 8"),
        (lambda: fmt.pack(grid.encode(weight).int(), grid), "codes"),
        (lambda: format_named("fp4"), "allowed: nvfp4"),
        (lambda: format_named("nvfp4", group_size=32), "no groups of 32"),
        (lambda: format_named("fp4-m2", group_size=24), "no groups of 24"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_foreign_tensors_are_looked_at() -> None:
    """Scales of another shape broadcast to a matrix of the right shape and the wrong numbers."""
    fmt = FORMATS["nvfp4"]
    packed = fmt.quantize(gaussian(4, 64))
    parts = packed.parts
    assert torch.equal(fmt.stored(packed.packed, parts).dequantize(), packed.dequantize())
    for wrong, says in (
        (Parts(parts.scales[:, :1], parts.tensor_scale), "scales"),
        (Parts(parts.scales.float(), parts.tensor_scale), "scales"),
        (Parts(parts.scales), "tensor_scale is missing"),
        (Parts(parts.scales, parts.tensor_scale, row_scale=torch.ones(4)), "row_scale"),
        (Parts(parts.scales, parts.tensor_scale, zeros=torch.ones(4, 4).byte()), "zeros"),
    ):
        with pytest.raises(ValueError, match=says):
            fmt.stored(packed.packed, wrong)
    with pytest.raises(ValueError, match="packed codes"):
        fmt.stored(packed.packed.int(), parts)


def test_a_step_of_zero_reads_as_zeros() -> None:
    """Others' checkpoints give a group of zeros the scale 0, and 0 / 0 is NaN."""
    fmt = FORMATS["nvfp4"]
    packed = fmt.quantize(gaussian(2, 32))
    scales = packed.scales.view(torch.uint8).clone()
    scales[1, 1] = 0
    grid = fmt.grid(Parts(scales.view(fp8.DTYPE), packed.tensor_scale), shape=(2, 32))
    codes = grid.encode(gaussian(2, 32))
    assert (codes[1, 16:] & 7 == 0).all()
    assert (grid.decode(codes)[1, 16:] == 0).all()


@pytest.mark.parametrize("search", ["amax", "mse"])
@pytest.mark.parametrize("name", ["nvfp4", "fp4-m2"])
def test_matrices_that_are_multiplied_as_one_share_a_scale(name: str, search: str) -> None:
    """vLLM takes the largest tensor scale of queries, keys and values for all three."""
    fmt = FORMATS[name]
    weights = [gaussian(8, 256, seed=i) * size for i, size in enumerate((0.02, 1.0, 0.3))]
    own = [fmt.shared_scale(weight) for weight in weights]
    shared = torch.stack([s for s in own if s is not None]).amax()
    packed = [fmt.quantize(weight, search=search, shared=shared) for weight in weights]
    as_file = packed if name == "nvfp4" else [as_nvfp4(p, tensor_scale=shared) for p in packed]
    for weight, one in zip(weights, as_file, strict=True):
        assert torch.equal(one.tensor_scale, shared)
        assert relative_error(one.dequantize(), weight) < 0.12
    with pytest.raises(ValueError, match="shared scale"):
        fmt.fit(weights[1], shared=shared / 2)


@pytest.mark.parametrize("search", ["amax", "mse"])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_m2_is_nvfp4_to_the_last_bit(search: str, group_size: int) -> None:
    """A matrix that changes when it is written is not the one whose perplexity was measured."""
    weight = gaussian(32, 512, seed=14) * torch.logspace(-4, 0, 32).unsqueeze(1)
    weight[3], weight[5, :128] = 0, 0
    packed = format_named("fp4-m2", group_size=group_size).quantize(weight, search=search)
    again = as_nvfp4(packed)
    assert again.format == "nvfp4"
    assert torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_m1_is_mxfp4_to_the_last_bit(group_size: int) -> None:
    """An exponent that is stored with another bias."""
    fmt = format_named("fp4-m1", group_size=group_size)
    packed = fmt.quantize(gaussian(16, 512, seed=15), search="mse")
    again = as_mxfp4(packed)
    assert again.format == "mxfp4"
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_what_does_not_fit_is_not_recast() -> None:
    """A matrix that is rounded once more on its way into a file."""
    far = gaussian(2, 256, seed=16) * torch.logspace(-12, 0, 256)
    with pytest.raises(ValueError, match="octaves apart"):
        as_nvfp4(format_named("fp4-m1", group_size=16).quantize(far))
    with pytest.raises(ValueError, match="has no scales for 32"):
        as_mxfp4(format_named("fp4-m1", group_size=16).quantize(far))
    with pytest.raises(ValueError, match="MXFP4 has not"):
        as_mxfp4(FORMATS["fp4-m2"].quantize(far))
    with pytest.raises(ValueError, match="NVFP4 has not"):
        as_nvfp4(FORMATS["int4"].quantize(far))


@pytest.mark.parametrize(
    ("name", "byte"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("nvfp4", 0x88), ("mxfp4", 0xFF)]
)
def test_a_scale_that_is_no_number_is_refused(name: str, byte: int) -> None:
    """One flipped bit of a file, and every answer is NaN or a group has the wrong sign."""
    packed = FORMATS[name].quantize(gaussian(4, 64))
    scales = packed.scales.view(torch.uint8).clone()
    scales[2, 1] = byte
    parts = Parts(scales.view(packed.scales.dtype), packed.tensor_scale)
    with pytest.raises(ValueError, match="a scale is negative, infinite or NaN"):
        FORMATS[name].stored(packed.packed, parts)

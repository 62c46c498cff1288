"""Codes and levels: E2M1, unsigned integers, powers of two, FP8, nibbles."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import codebook, e2m1, fp8, nibbles, powers, uint4

BOOKS = (codebook.E2M1, codebook.UINT4)
LEVELS = torch.tensor(e2m1.MAGNITUDES)


def next_to(values: torch.Tensor) -> torch.Tensor:
    """The values, and the float32 numbers on either side of each."""
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


def test_e2m1_rounds_to_nearest_and_ties_to_even() -> None:
    """A threshold that is off by a bit, or a tie rounded away, differs from the hardware's cvt."""
    ties = (LEVELS[1:] + LEVELS[:-1]) / 2
    magnitudes = next_to(
        torch.cat([LEVELS, ties, torch.linspace(0, 6, 997), torch.tensor([7.0, 99.0])])
    )
    magnitudes = magnitudes[magnitudes >= 0]
    distance = (magnitudes.double().unsqueeze(1) - LEVELS.double()).abs()
    # Among the nearest, an even code comes before an odd one.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    expected = order[distance[:, order].argmin(1)].to(torch.uint8)
    assert torch.equal(e2m1.nearest(magnitudes), expected)
    assert torch.equal(e2m1.nearest(-magnitudes), expected | 8), "the sign of zero is kept"


def test_e2m1_levels_are_read_back() -> None:
    """A swapped pair of levels changes every weight that has one of them."""
    codes = torch.arange(16, dtype=torch.uint8)
    levels = e2m1.decode(codes)
    assert levels.tolist() == [*e2m1.MAGNITUDES, *(-m for m in e2m1.MAGNITUDES)]
    assert torch.equal(e2m1.nearest(levels), codes)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_a_search_rounds_as_the_codes_do(book: codebook.Codebook) -> None:
    """Scales chosen by another rounding than the one that is used are not the best."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 5 + book.zero
    assert torch.equal(book.rounded(values), book.decode(book.nearest(values)))


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_stochastic_rounding_is_unbiased(book: codebook.Codebook) -> None:
    """Odds that do not follow the distance to both neighbours push every weight the same way."""
    levels = book.decode(torch.arange(16, dtype=torch.uint8)).sort().values
    values = torch.linspace(float(levels[0]), float(levels[-1]), 61)
    n = 20_000
    g = torch.Generator().manual_seed(1)
    drawn = book.decode(book.stochastic(values.expand(n, -1), generator=g)).double()
    below = levels[(torch.searchsorted(levels, values, right=True) - 1).clamp(0, 14)]
    above = levels[torch.searchsorted(levels, values).clamp(0, 15)]
    assert ((drawn >= below.clamp(max=values)) & (drawn <= above.clamp(min=values))).all()
    spread = ((values - below) * (above - values)).double().clamp_min(0).sqrt()
    off = (drawn.mean(0) - values.double()).abs()
    assert (off <= 4.5 * spread / n**0.5 + 1e-12).all()


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_stochastic_rounding_leaves_levels_alone(book: codebook.Codebook) -> None:
    """floor(code + u) moves a value that is a level when u is next to 1, and past the last code."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(200_000)
    g = torch.Generator().manual_seed(2)
    assert torch.equal(book.stochastic(book.decode(codes), generator=g), codes)


def test_integers_saturate_and_ties_are_even() -> None:
    """An unsigned code below 0 wraps to 255 and spills into its neighbour's half byte."""
    values = torch.tensor([-3.0, -0.5, 0.5, 1.5, 14.5, 15.4, 99.0])
    assert uint4.nearest(values).tolist() == [0, 0, 0, 2, 14, 15, 15]


def test_the_even_column_is_the_low_half() -> None:
    """The other order is read by every other program as neighbours swapped."""
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert nibbles.pack(codes).tolist() == [[0x21, 0xF3]]
    assert torch.equal(nibbles.unpack(nibbles.pack(codes)), codes)


def test_powers_are_torchs_e8m0() -> None:
    """2^-127 is subnormal in float32 and easily becomes 0 or 2^-126."""
    stored = torch.arange(255, dtype=torch.uint8)
    expected = stored.view(torch.float8_e8m0fnu).float()
    assert torch.equal(powers.from_bytes(stored), expected)
    assert torch.equal(powers.to_bytes(powers.floor_log2(expected)), stored)
    assert torch.equal(powers.to_bytes(powers.ceil_log2(expected)), stored)
    assert powers.to_bytes(torch.tensor([-999, 999])).tolist() == [0, 254]


def test_logarithms_are_exact_beside_powers_of_two() -> None:
    """log2 in float32 says 5 for the number below 32, so a scale is off by two."""
    exponents = torch.arange(-126, 128)
    power = torch.ldexp(torch.ones(254), exponents)
    below, above = power.nextafter(torch.zeros(())), power.nextafter(torch.tensor(torch.inf))
    assert torch.equal(powers.floor_log2(below), exponents.int() - 1)
    assert torch.equal(powers.floor_log2(above), exponents.int())
    assert torch.equal(powers.ceil_log2(below), exponents.int())
    assert torch.equal(powers.ceil_log2(above), exponents.int() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (0, 8)])
def test_fp8_rows_are_torchs_float8(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A scale of the tensor where one of the row is meant, or a cast without its clamp."""
    g = torch.Generator().manual_seed(3)
    values = (torch.randn(shape, generator=g) * 30).to(dtype)
    stored, scale = fp8.quantize_rows(values)
    exact = values.float() / (values.float().abs().amax(-1, keepdim=True) / 448)
    assert torch.equal(stored.float(), exact.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert scale.shape == (*shape[:-1], 1)
    assert torch.equal(fp8.rounded_rows(values), (stored.float() * scale).to(dtype))


def test_fp8_rows_of_zeros_and_of_nothing_but_dust() -> None:
    """0 / 0 makes a padding token NaN, and the token NaN the whole batch's softmax."""
    values = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [3e38, -3e38], [-0.0, 448.0]])
    stored, scale = fp8.quantize_rows(values)
    assert torch.isfinite(stored.float()).all()
    assert (scale > 0).all()
    assert torch.allclose(fp8.dequantize_rows(stored, scale), values, rtol=0.07, atol=1e-41)


def test_fp8_keeps_a_broken_activation_visible() -> None:
    """A NaN that is clamped away is a wrong answer that looks right."""
    values = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 2.0]])
    rounded = fp8.rounded_rows(values)
    assert rounded.isnan().any(1).tolist() == [True, True, False]

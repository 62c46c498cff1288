"""FP4 and its scales as FP8 levels: the arithmetic of tables, and what it costs."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import Packed, Parts, e2m1, format_named, fp8, nibbles
from trimtab.kernels.matmul import reference, tables


def drawn(n_out: int = 64, n_in: int = 1024) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def test_levels_are_subtractions_of_bytes() -> None:
    """Kernels subtract 8 for a half and 4 or 5 for two thirds: right for every top, or for none."""
    top = torch.arange(tables.LEAST, 127, dtype=torch.uint8)
    found = tables.levels(top).view(torch.uint8).int()
    six, mantissa = top.int(), top.int() & 7
    four = six - torch.where((mantissa >= 3) & (mantissa <= 5), 4, 5)
    assert torch.equal(
        found,
        torch.stack((six * 0, four - 24, four - 16, six - 16, four - 8, six - 8, four, six), dim=1),
    )


def test_powers_of_two_lose_nothing() -> None:
    """MXFP4, M1 and M2 are exact in FP8; a table of rounded thirds would cost them 1.4 %."""
    for name in ("mxfp4", "fp4-m1", "fp4-m2"):
        packed = format_named(name).quantize(drawn())
        found = reference.weight(packed, activations="fp8")
        assert torch.equal(found, packed.dequantize()), name


def test_nvfp4_loses_little() -> None:
    """1.42 % beside NVFP4's own 9.5 %: the sum is 9.6 % on gaussian weights."""
    weight = drawn()
    packed = format_named("nvfp4").quantize(weight)
    found = reference.weight(packed, activations="fp8")
    assert 0.012 < off(found, packed.dequantize()) < 0.015
    assert off(found, weight) < 1.015 * off(packed.dequantize(), weight)


def test_tensor_scales_that_are_no_power_of_two() -> None:
    """Files of others have any; it belongs to the rows, not to the bytes."""
    packed = format_named("nvfp4").quantize(drawn())
    parts = Parts(packed.scales, tensor_scale=torch.tensor(3.7e-4))
    other = format_named("nvfp4").stored(packed.packed, parts)
    assert off(reference.weight(other, activations="fp8"), other.dequantize()) < 0.015


def nvfp4_of(scales: torch.Tensor) -> Packed:
    """Return a matrix of all codes, a row for each row of scales `[n_out, n_groups]`."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(*scales.shape)
    parts = Parts(scales.to(fp8.DTYPE), tensor_scale=torch.tensor(1.0))
    return format_named("nvfp4").stored(nibbles.pack(codes), parts)


def test_small_groups_beside_large_ones() -> None:
    """A group far below its row's largest has no normal levels: bytes would wrap around."""
    packed = nvfp4_of(torch.tensor([[448.0, 0.25, 2.0**-3, 2.0**-9, 0.0]]))
    codes, tops, rows = tables.tops(packed)
    assert (tops >= tables.LEAST).all()
    found, wanted = tables.dequantize(codes, tops, rows), packed.dequantize()
    # E4M3's half ulp, or half the widest step of LEAST's levels: 1 / 14000 of the row's largest.
    room = torch.maximum(wanted.abs() / 16, torch.tensor(0.1875))
    assert ((found - wanted).abs() <= room).all()
    assert (found[:, 64:] == 0).all()


def test_rows_of_zeros() -> None:
    """A scale of 0 has no exponent; 0 / 0 would be the weight."""
    packed = nvfp4_of(torch.zeros(2, 3))
    assert (reference.weight(packed, activations="fp8") == 0).all()
    zeros = format_named("mxfp4").quantize(torch.zeros(2, 64))
    assert (reference.weight(zeros, activations="fp8") == 0).all()


def test_int4_has_no_table() -> None:
    """Sixteen levels read as eight with a sign are another matrix."""
    with pytest.raises(ValueError, match="int4 is no FP4 format"):
        tables.tops(format_named("int4").quantize(drawn()))


def test_signs() -> None:
    """Bit 3 is the sign of every level, zero's too."""
    packed = nvfp4_of(torch.ones(1, 1))
    codes, tops, rows = tables.tops(packed)
    found = tables.dequantize(codes, tops, rows)[0]
    assert torch.equal(found, e2m1.decode(torch.arange(16)))

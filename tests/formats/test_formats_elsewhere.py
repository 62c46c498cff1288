"""The formats against other people's implementations, bit for bit."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import FORMATS, e2m1, fp8, nibbles
from trimtab.kernels.formats.nvfp4 import NVFP4


def gaussian(n_out: int, n_in: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * 0.03


def all_codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(8, 32)


def test_compressed_tensors_reads_our_bytes() -> None:
    """A swapped half byte or sign makes every other program load another model."""
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    bytes_ = all_codes()
    theirs = helpers.unpack_fp4_from_uint8(bytes_, 8, 64, dtype=torch.float32)
    assert torch.equal(e2m1.decode(nibbles.unpack(bytes_)), theirs)
    assert torch.equal(helpers.pack_fp4_to_uint8(theirs), bytes_)


def test_compressed_tensors_rounds_as_we_do() -> None:
    """Ties rounded the other way: the same model quantised here and there differs."""
    args = pytest.importorskip("compressed_tensors.quantization.quant_args")
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = torch.cat([ties, -ties, ties + 1e-6, ties - 1e-6, torch.linspace(-6, 6, 501)])
    theirs = args.FP4_E2M1_DATA.cast_to_fp4(values)
    assert torch.equal(e2m1.rounded(values), theirs)


def test_torchao_nvfp4() -> None:
    """Another scale, another rounding or another order of columns than the reference's."""
    # In a folder of its own (make test-torchao): transformers imports it wherever it is installed.
    ao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = gaussian(64, 512)
    ours = NVFP4().quantize(weight)
    theirs = ao.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=ours.tensor_scale)
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scale.view(torch.uint8))
    # They multiply by the reciprocal of the scale, we divide: a tie may fall on the other side.
    assert (ours.packed != theirs.qdata).float().mean() < 1e-4
    read = NVFP4().stored(theirs.qdata, ours.parts)
    assert torch.equal(read.dequantize(), theirs.dequantize(torch.float32))


def test_torchao_mxfp4() -> None:
    """An exponent off by one halves or doubles a group."""
    ao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = gaussian(64, 512)
    weight[3, :32] = 0.0
    ours = FORMATS["mxfp4"].quantize(weight)
    scale, packed = ao.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(ours.scales, scale.view(torch.uint8))
    assert torch.equal(ours.packed, packed.view(torch.uint8))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_nvfp4_scales_are_torchs_cast(size: float) -> None:
    """E4M3 built by hand next to a tie or below its normal numbers."""
    weight = gaussian(16, 256) * size * torch.logspace(-6, 0, 256)
    packed = NVFP4().quantize(weight)
    assert packed.tensor_scale is not None
    wanted = weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 / packed.tensor_scale
    theirs = wanted.to(fp8.DTYPE).float().clamp(min=2.0**-9)
    assert torch.equal(packed.scales.float(), theirs)

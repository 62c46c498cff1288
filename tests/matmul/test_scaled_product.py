"""Blackwell's way with MXFP4, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.formats import format_named
from trimtab.kernels.matmul import reference
from trimtab.kernels.matmul.scaled_weight import ScaledWeight


@pytest.mark.triton
@pytest.mark.parametrize("n_tokens", [0, 1, 33])
def test_the_tensor_cores_take_the_scales(n_tokens: int, device: torch.device) -> None:
    """A scale beside its group, a mask that is off by a pair, or the order of fragments in x."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 10:
        pytest.skip("this GPU's tensor cores take no scales")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 352, generator=generator)
    weight[:, 32:64] *= 16
    packed = format_named("mxfp4").quantize(weight)
    x = torch.randn(n_tokens, 352, generator=generator).bfloat16()
    bias = torch.randn(130, generator=generator).bfloat16()
    made = ScaledWeight(packed, device=device, dtype=torch.bfloat16)
    found = made(x.to(device), bias.to(device)).float().cpu()
    wanted = reference.matmul(x, packed, activations="fp8", bias=bias)
    assert found.shape == (n_tokens, 130)
    off = (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)
    assert off.sqrt() < 2e-3
    assert torch.equal(made.dense(), packed.dequantize())


def test_only_mxfp4_has_such_scales() -> None:
    """NVFP4 in the instruction for groups of 32 is another matrix."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    formats = [("mxfp4", 32), ("fp4-m1", 32), ("fp4-m1", 16), ("fp4-m2", 32), ("nvfp4", 16)]
    taken = [
        ScaledWeight.takes(format_named(name, group_size=group).quantize(weight))
        for name, group in formats
    ]
    assert taken == [True, True, False, False, False]

"""The Triton products against their specification in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.kernels.formats import Packed, Parts, e2m1, format_named, fp8, nibbles
from trimtab.kernels.matmul import dispatch, operator, reference
from trimtab.kernels.matmul.fragment_weight import FragmentWeight

pytestmark = pytest.mark.triton

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
# Half an ulp of the result, uniformly, has an RMS of 1.7e-3 and 2.1e-4 of it. INT4's weights are
# rounded to the dtype too.
ROUNDING = {BFLOAT16: 2.0e-3, FLOAT16: 2.6e-4}
FORMATS = [
    ("nvfp4", None),
    ("mxfp4", None),
    ("fp4-m1", 128),
    ("fp4-m2", 16),
    ("fp4-m2", 48),
    ("int4", 128),
    ("int4", 32),
    ("int4-asym", 64),
]
ODD_OUT = 70  # neither rows nor columns fill the tiles


def odd_in(group_size: int | None) -> int:
    return 896 if group_size in (64, 128) else 864


def matrix(name: str, group_size: int | None = None, *, n_out: int, n_in: int) -> Packed:
    """Return a seeded matrix whose rows and groups differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(n_out * n_in)
    weight = torch.randn(n_out, n_in, generator=generator)
    weight[1::7] *= 1e-3
    weight[:, ::9] *= 4
    return format_named(name, group_size=group_size).quantize(weight)


def tokens(n_tokens: int, n_in: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, n_in, generator=generator).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the RMS of the difference, relative to the wanted RMS."""
    off = found.float().cpu() - wanted.cpu()
    return float(off.square().mean().sqrt() / wanted.square().mean().sqrt())


def prepared(packed: Packed, device: torch.device, **options: Any) -> FragmentWeight:
    options = {"dtype": BFLOAT16, "activations": "same"} | options
    return FragmentWeight(packed, device=device, **options)


@pytest.mark.parametrize(("name", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_w4a16(name: str, group_size: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """A code, scale or column that the layout puts in another's place changes the product."""
    n_in = odd_in(group_size)
    packed = matrix(name, group_size, n_out=ODD_OUT, n_in=n_in)
    weight = prepared(packed, device, dtype=dtype)
    x = tokens(7, n_in, dtype)
    rounding = ROUNDING[dtype] * (1.5 if name.startswith("int4") else 1)
    assert error(weight(x.to(device)), reference.matmul(x, packed)) < rounding


@pytest.mark.parametrize(("name", "group_size"), FORMATS[:5])
def test_w4a8(name: str, group_size: int | None, device: torch.device) -> None:
    """With float32 results nothing hides a level, a sign or a token's scale that is not right."""
    packed = matrix(name, group_size, n_out=ODD_OUT, n_in=odd_in(group_size))
    it = prepared(packed, device, activations="fp8").fragments
    x = tokens(7, odd_in(group_size), torch.float32)
    found = operator.four_bit_product(x.to(device), it.codes, it.scales, it.rows, None, it.scheme)
    assert error(found, reference.matmul(x, packed, activations="fp8")) < 1e-6


@pytest.mark.parametrize("n_tokens", [1, 16, 33, 64])
@pytest.mark.parametrize("activations", ["same", "fp8"])
def test_every_tile_of_decoding(n_tokens: int, activations: Any, device: torch.device) -> None:
    """A tile whose last rows or tokens are masked wrongly is wrong at its edge."""
    packed = matrix("nvfp4", n_out=130, n_in=512)
    x, bias = tokens(n_tokens, 512, BFLOAT16), tokens(1, 130, BFLOAT16)[0]
    weight = prepared(packed, device, activations=activations)
    wanted = reference.matmul(x, packed, activations=activations, bias=bias)
    assert error(weight(x.to(device), bias.to(device)), wanted) < ROUNDING[BFLOAT16]


@pytest.mark.parametrize("shape", [(64, 4096), (4096, 64)])
@pytest.mark.parametrize("activations", ["same", "fp8"])
def test_wide(shape: tuple[int, int], activations: Any, device: torch.device) -> None:
    """Sums over thousands of columns, split between programs; rows far apart in memory."""
    packed = matrix("nvfp4", n_out=shape[0], n_in=shape[1])
    x = tokens(2, shape[1], BFLOAT16)
    weight = prepared(packed, device, activations=activations)
    wanted = reference.matmul(x, packed, activations=activations)
    assert error(weight(x.to(device)), wanted) < ROUNDING[BFLOAT16]


@pytest.mark.parametrize(
    ("name", "activations"), [("nvfp4", "same"), ("nvfp4", "fp8"), ("int4", "same")]
)
def test_prompts_are_expanded(
    name: str, activations: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through scratch memory has columns, scales and bias of its own to get wrong."""
    table = dispatch.dispatch()
    packed = matrix(name, n_out=ODD_OUT, n_in=640)
    weight = prepared(packed, device, activations=activations)
    n_tokens = table.table(weight.fragments.scheme).expand_from
    x, bias = tokens(n_tokens, 640, BFLOAT16), tokens(1, ODD_OUT, BFLOAT16)[0]
    monkeypatch.delattr(operator, "tile_product")
    # A thousand programs of the interpreter for the thousand tokens: torch's rounding is the same.
    monkeypatch.setattr(operator, "quantize_tokens", _quantized_by_torch)
    found = weight(x.to(device), bias.to(device))
    wanted = reference.matmul(x, packed, activations=activations, bias=bias)
    assert error(found, wanted) < 1.6 * ROUNDING[BFLOAT16]


def _quantized_by_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from trimtab.kernels.matmul.fragments import COLUMNS, column_order

    q, scales = fp8.quantize_rows(torch.nn.functional.pad(x, (0, -x.shape[1] % COLUMNS)))
    order = column_order("fp8").flatten().to(x.device)
    blocks = q.view(torch.uint8).unflatten(1, (-1, COLUMNS))
    return blocks[..., order].flatten(1).view(fp8.DTYPE), scales.squeeze(1)


def every_scale() -> Packed:
    """Return an NVFP4 matrix with all codes under all positive scales of E4M3."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(fp8.DTYPE).unsqueeze(1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(126, 1)
    parts = Parts(scales, tensor_scale=torch.tensor(2.0**-6))
    return format_named("nvfp4").stored(nibbles.pack(codes), parts)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_nvfp4_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    """Level times scale fits both types, so a decoded weight that differs in a bit is a bug."""
    packed = every_scale()
    found = prepared(packed, device, dtype=dtype).dense(torch.float32).cpu()
    wanted = e2m1.decode(packed.codes()) * packed.scales.float() * 2.0**-6
    assert torch.equal(found, wanted)


def test_levels_in_registers_are_those_of_the_specification(device: torch.device) -> None:
    """Tables are made by integer arithmetic, which must give what rounding to E4M3 gives."""
    packed = every_scale()
    found = prepared(packed, device, activations="fp8").dense().cpu()
    assert torch.equal(found, reference.weight(packed, activations="fp8"))


@pytest.mark.parametrize(("name", "group_size"), FORMATS)
def test_dense_is_the_matrix(name: str, group_size: int | None, device: torch.device) -> None:
    """A backward pass through another matrix than the forward's trains on a wrong gradient."""
    packed = matrix(name, group_size, n_out=ODD_OUT, n_in=odd_in(group_size))
    found = prepared(packed, device, dtype=FLOAT16).dense()
    most = 3e-4 if name.startswith("int4") else 0.0
    assert error(found, packed.dequantize()) <= most


@pytest.mark.parametrize("n_in", [16, 300, 1024])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_tokens_are_rounded_as_torch_rounds(
    n_in: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An approximate division, or a maximum over masked lanes, changes bits of FP8."""
    x = tokens(3, n_in, dtype).to(device)
    x[1] = 0
    wanted, scales = fp8.quantize_rows(x)
    places = _places(n_in)
    for longest in (operator._ONE_BLOCK, 1):  # at once, and piece by piece
        monkeypatch.setattr(operator, "_ONE_BLOCK", longest)
        monkeypatch.setattr(operator, "_TURN", 256)
        q, found = operator.quantize_tokens(x)
        assert torch.equal(found, scales.squeeze(1))
        assert torch.equal(q.view(torch.uint8)[:, places], wanted.view(torch.uint8))
        assert (q.view(torch.uint8).sum(1) == wanted.view(torch.uint8).sum(1)).all()  # padding


def _places(n_in: int) -> torch.Tensor:
    """Return where each column is among FP8's places."""
    from trimtab.kernels.matmul.fragments import COLUMNS, column_order

    place_of = column_order("fp8").flatten().argsort()
    columns = torch.arange(n_in)
    return columns // COLUMNS * COLUMNS + place_of[columns % COLUMNS]


def test_a_broken_token_stays_visible_and_alone(device: torch.device) -> None:
    """NaN that a maximum swallows, or that spreads to a neighbour, hides or breaks an answer."""
    weight = prepared(matrix("nvfp4", n_out=64, n_in=256), device, activations="fp8")
    x = tokens(3, 256, BFLOAT16).to(device)
    alone = weight(x)
    x[1, 5] = torch.nan
    found = weight(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], alone[[0, 2]])

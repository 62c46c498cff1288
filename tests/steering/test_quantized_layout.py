"""Quantised matrices as compressed-tensors stores them, against its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_toys import Quantiser, by_format, quantise, save_original

from trimtab.kernels.formats import Fp8Matrix, Packed, format_named, fp8
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized import QuantizationFacts, from_tensors, to_tensors
from trimtab.steering.model.quantized.groups import read_groups, write_groups
from trimtab.steering.model.quantized.layout import Layout, Matrix, layout_of

FORMATS: dict[str, tuple[str, int | None]] = {
    "nvfp4": ("nvfp4", None),
    "mxfp4": ("mxfp4", None),
    "int4": ("int4", 32),
    "int4-asym": ("int4-asym", 32),
    "int4 by row": ("int4", 64),
    "fp8": ("fp8", None),
    "fp4-m1": ("fp4-m1", None),
    "fp4-m1 of 16": ("fp4-m1", 16),
    "fp4-m2": ("fp4-m2", None),
}


def matrix(case: str, *, n_out: int = 24, n_in: int = 64) -> Matrix:
    name, group_size = FORMATS[case]
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.1
    made = by_format(name, group_size=group_size)("", weight)
    assert made is not None
    return made


def scheme_of(made: Matrix) -> Any:
    quant_scheme = pytest.importorskip("compressed_tensors.quantization")
    group = layout_of(made).config_group(["Linear"], has_fp8_activations=True)
    return quant_scheme.QuantizationScheme(**group)


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("shape", [(24, 64), (1, 64), (17, 128)])
def test_stored_then_read_is_the_same(case: str, shape: tuple[int, int]) -> None:
    """Codes shuffled within a word, or zero points of rows that fill no word, lost."""
    made = matrix(case, n_out=shape[0], n_in=shape[1])
    again = from_tensors(layout_of(made), to_tensors(made))
    assert again.shape == made.shape
    assert torch.equal(again.dequantize(), made.dequantize())


@pytest.mark.parametrize("case", FORMATS)
def test_compressed_tensors_reads_the_same_weights(case: str) -> None:
    """A reciprocal that is none, or a sign of the zero point, and every other program is off."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    made = matrix(case)
    scheme = scheme_of(made)
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    weight = compressor.decompress(to_tensors(made), scheme)["weight"].float()
    # It multiplies integers in the scale's type, bfloat16; all else is exact there.
    step = 2**-8 if case.startswith("int4") else 0.0
    assert ((weight - made.dequantize()).abs() <= step * made.dequantize().abs()).all()


@pytest.mark.parametrize("case", ["nvfp4", "mxfp4", "int4", "int4-asym", "fp8"])
def test_we_read_what_compressed_tensors_stores(case: str) -> None:
    """A checkpoint of llm-compressor that loads and says something else."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    made = matrix(case)
    scheme = scheme_of(made)
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    ours = to_tensors(made)
    theirs = compressor.compress({"weight": made.dequantize(), **_parameters(made)}, scheme)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        # On a CPU it writes -0 as 0, where the hardware's conversion keeps the sign.
        if name != "weight_packed" or not case.endswith("fp4"):
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    read = from_tensors(layout_of(made), theirs)
    assert torch.equal(read.dequantize(), made.dequantize())


def _parameters(made: Matrix) -> dict[str, torch.Tensor]:
    """Return scales as compressed-tensors has them before it stores them."""
    if isinstance(made, Fp8Matrix):
        return {"weight_scale": made.scale}
    parts = made.parts
    if parts.tensor_scale is not None:
        return {
            "weight_scale": parts.scales.float(),
            "weight_global_scale": (1 / parts.tensor_scale).reshape(1),
        }
    if parts.scales.dtype == torch.uint8:
        return {"weight_scale": parts.steps()}
    zeros = parts.zeros
    named = {"weight_scale": parts.scales}
    if zeros is not None:
        named["weight_zero_point"] = (zeros.int() - 8).to(torch.int8)
    return named


MIXED = {"down_proj": "fp8", "q_proj": "mxfp4"}


def mixed(module: str, weight: torch.Tensor) -> Matrix | None:
    """FP8, two 4-bit formats, and one layer kept."""
    if module.endswith("layers.0.mlp.up_proj"):
        return None
    return by_format(MIXED.get(module.rpartition(".")[2], "nvfp4"))(module, weight)


@pytest.mark.parametrize(
    ("quantiser", "dequantize"),
    [
        (by_format("nvfp4"), True),
        (by_format("mxfp4"), True),
        (by_format("int4", group_size=32), False),
        (by_format("fp4-m2"), True),
        # Here each group is decompressed by its own scheme; `dequantize` takes the first for all.
        (mixed, False),
    ],
    ids=["nvfp4", "mxfp4", "int4", "fp4-m2", "mixed"],
)
def test_transformers_loads_the_folder(
    quantiser: Quantiser, dequantize: bool, tmp_path: Path
) -> None:
    """A config that only we can read, or a name that transformers does not find."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from trimtab.steering.model.quantized.folder import read_folder

    dense = quantise(
        save_original(tmp_path / "toy"), tmp_path / "q", quantiser, facts=QuantizationFacts("x")
    )
    folder = read_folder(tmp_path / "q")
    assert folder is not None
    assert {name: m.dequantize().tolist() for name, m in folder.matrices()} == {
        name: weight.tolist() for name, weight in dense.items()
    }
    options = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "q", dtype=torch.bfloat16, **options
        )
        with torch.no_grad():
            model(torch.arange(3, 23)[None])  # packed layers are unpacked by their first pass
    for name, weight in dense.items():
        theirs = model.get_submodule(name).weight.float()
        assert torch.allclose(theirs, weight, rtol=2**-7, atol=0), name


def test_a_group_names_its_modules() -> None:
    """Mixed precision whose groups all say Linear: the first is taken for all."""
    layouts = {
        "a.q": Layout("nvfp4", 16),
        "a.down": Layout("fp8", None),
        "b.q": Layout("nvfp4", 16),
    }
    config = write_groups(layouts, ignore=["lm_head"], has_fp8_activations=False)
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["a.q", "b.q"], ["a.down"]]
    groups = read_groups(config, where="it")
    assert [group.layout for group in groups] == [Layout("nvfp4", 16), Layout("fp8", None)]
    one = write_groups({"a.q": Layout("int4", 64)}, ignore=[], has_fp8_activations=False)
    assert one["format"] == "pack-quantized"
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]


def valid() -> dict[str, Any]:
    return write_groups({"q": Layout("nvfp4", 16)}, ignore=[], has_fp8_activations=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(quant_method="gptq"), "quantised by 'gptq'"),
        (lambda c: c.update(quantization_status="frozen"), "'frozen'"),
        (lambda c: c.update(transform_config={"a": 1}), "transform_config"),
        (lambda c: c.update(config_groups={}), "no groups"),
        (lambda c: c.pop("config_groups"), "unreadable"),
        (lambda c: _weights(c).update(num_bits=8, type="int"), "8-bit int weights"),
        (lambda c: _weights(c).update(symmetric=False), "4-bit float weights"),
        (lambda c: _weights(c).update(actorder="group"), "reordered"),
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "'marlin-24'"),
        (lambda c: c["config_groups"]["group_0"].update(weights=None), "activations only"),
    ],
)
def test_what_we_cannot_read_is_refused_by_name(change: Any, says: str) -> None:
    """A format read as its neighbour gives fluent nonsense."""
    config = valid()
    change(config)
    with pytest.raises(ModelLoadError, match=says):
        read_groups(config, where="The model")


def _weights(config: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    return weights


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("nvfp4", {"weight_scale": None}, "weight_scale missing"),
        ("nvfp4", {"weight_scale": torch.ones(24, 4)}, "scales"),
        ("nvfp4", {"weight_packed": torch.zeros(24, 32)}, "packed codes"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "positive"),
        ("nvfp4", {"weight_global_scale": torch.ones(2)}, "weight_global_scale"),
        ("mxfp4", {"weight_scale": torch.ones(24, 3, dtype=torch.uint8)}, "scales"),
        ("int4", {"weight_shape": torch.tensor([24, 63])}, "words"),
        ("int4-asym", {"weight_zero_point": torch.ones(24, 2, dtype=torch.int8)}, "zero_point"),
        ("fp8", {"weight_scale": torch.ones(23, 1)}, "weight_scale"),
        ("fp8", {"weight": torch.zeros(24, 64)}, "weight is torch.float32"),
    ],
)
def test_damaged_tensors_are_refused(case: str, change: dict[str, Any], says: str) -> None:
    """Scales of another shape broadcast, and the weight has the right shape and wrong numbers."""
    made = matrix(case)
    tensors = {k: v for k, v in (to_tensors(made) | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        from_tensors(layout_of(made), tensors)


def test_fp8_by_tensor_is_read_by_row() -> None:
    """One scale for the matrix, as others' FP8 checkpoints have it, taken for one row's."""
    values = (torch.randn(8, 16) * 50).to(fp8.DTYPE)
    read = from_tensors(
        Layout("fp8", None), {"weight": values, "weight_scale": torch.tensor([0.5]).bfloat16()}
    )
    assert torch.equal(read.dequantize(), values.float() * 0.5)


def test_a_common_tensor_scale_reaches_the_file() -> None:
    """vLLM multiplies queries, keys and values as one and takes the largest of their scales."""
    packed = format_named("fp4-m2").quantize(torch.randn(8, 64) * 0.01)
    assert isinstance(packed, Packed)
    wanted = torch.tensor(2.0**-9)
    tensors = to_tensors(packed, tensor_scale=wanted)
    assert float(tensors["weight_global_scale"]) == 2.0**9
    again = from_tensors(Layout("nvfp4", 16), tensors)
    assert torch.equal(again.dequantize(), packed.dequantize())

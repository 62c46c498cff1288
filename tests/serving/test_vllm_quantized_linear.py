"""vLLM's own linear layers over 4-bit weights: every rank has its part, and every part its scales.

No engine runs here. Layers are made as on one rank of several, are given a checkpoint's tensors
the way a model's `load_weights` gives them, and what the ranks compute is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.kernels.formats import Packed, format_named, fp8
from trimtab.kernels.matmul import reference
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized import Matrix, QuantizationFacts, layout, to_tensors
from trimtab.steering.model.quantized.writer import LORC_A, LORC_B, LORC_NAME

pytestmark = pytest.mark.vllm

FORMATS = ("nvfp4", "mxfp4", "int4", "int4-asym", "fp8")
GROUPS = {"int4": 32, "int4-asym": 32}
N_IN = 192
HEAD = 32


def matrix(format: str, n_out: int, *, seed: int, scale: float = 1.0) -> Matrix:
    """Return a quantised random matrix.

    Args:
        format: its name.
        n_out: rows.
        seed: of the weights.
        scale: of NVFP4's tensor scale, which a power of two leaves one.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, N_IN, generator=generator)
    if format == "fp8":
        return fp8.quantize_matrix(weight)
    made = format_named(format, group_size=GROUPS.get(format)).quantize(weight)
    if made.tensor_scale is None:
        return made
    return replace(made, parts=replace(made.parts, tensor_scale=made.tensor_scale * scale))


@contextmanager
def on_rank(rank: int, size: int) -> Iterator[None]:
    """Make layers as one rank of several has them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (parameter, linear):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        yield


def quantization(format: str, *, activations: Any = "same") -> Any:
    """Return our configuration of a checkpoint that is all of one format."""
    from trimtab.serving.engines.vllm.quantization import TrimtabQuantization, register_op

    register_op()
    stored = layout.Layout(format, {"nvfp4": 16, "mxfp4": 32, "fp8": None}.get(format, 32))
    group = stored.config_group(["Linear"], has_fp8_activations=activations == "fp8")
    config = {"config_groups": {"group_0": group}, "ignore": [], "format": group["format"]}
    made = TrimtabQuantization.from_config(config)
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    made.facts = QuantizationFacts("some", activations=activations)
    return made


def load(layer: Any, tensors: dict[str, torch.Tensor], shard: Any = None) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def ready(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, bias)


def inputs() -> torch.Tensor:
    return torch.randn(5, N_IN, generator=torch.Generator().manual_seed(99))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-6, float(error)


# --- layers, ranks and formats


def merged(made: list[Matrix], config: Any, *, sizes: list[int]) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    layer = MergedColumnParallelLinear(
        N_IN, sizes, bias=False, quant_config=config, prefix="model.layers.0.mlp.gate_up_proj"
    )
    for number, one in enumerate(made):
        load(layer, to_tensors(one), number)
    return ready(layer)


def qkv(made: list[Matrix], config: Any, *, n_heads: int, n_kv: int) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    layer = QKVParallelLinear(
        N_IN, HEAD, n_heads, n_kv, bias=False, quant_config=config, prefix="model.layers.0.qkv_proj"
    )
    for shard, one in zip("qkv", made, strict=True):
        load(layer, to_tensors(one), shard)
    return ready(layer)


def row(made: Matrix, config: Any) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    layer = RowParallelLinear(
        N_IN, made.shape[0], bias=False, quant_config=config, prefix="model.layers.0.down_proj"
    )
    load(layer, to_tensors(made))
    return ready(layer)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_merged_layers_keep_every_matrix_its_own_scales(format: str, n_ranks: int) -> None:
    """The largest tensor scale for all, which is what vLLM's own method makes of several."""
    made = [matrix(format, 48, seed=1), matrix(format, 96, seed=2, scale=3 * 2.0**-5)]
    x, parts = inputs(), []
    for rank in range(n_ranks):
        with on_rank(rank, n_ranks):
            layer = merged(made, quantization(format), sizes=[48, 96])
        parts.append(apply(layer, x).split([48 // n_ranks, 96 // n_ranks], dim=-1))
    for one, shares in zip(made, zip(*parts, strict=True), strict=True):
        close(torch.cat(shares, dim=-1), x @ one.dequantize().t())


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_heads_are_shared_out_and_few_key_heads_repeated(format: str, n_ranks: int) -> None:
    """A rank with another's heads, where there are fewer key heads than ranks too."""
    n_heads, n_kv = 4, 2
    made = [matrix(format, HEAD * n, seed=n) for n in (n_heads, n_kv, n_kv)]
    expected = [inputs() @ one.dequantize().t() for one in made]
    for rank in range(n_ranks):
        with on_rank(rank, n_ranks):
            layer = qkv(made, quantization(format), n_heads=n_heads, n_kv=n_kv)
        found = apply(layer, inputs())
        mine = n_heads // n_ranks * HEAD
        kv = max(n_kv // n_ranks, 1) * HEAD
        first = rank * n_kv // n_ranks * HEAD
        places = [(0, rank * mine, mine), (mine, first, kv), (mine + kv, first, kv)]
        for (at, begin, size), whole in zip(places, expected, strict=True):
            close(found[:, at : at + size], whole[:, begin : begin + size])


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_shares_of_the_inputs_add_up(format: str, n_ranks: int) -> None:
    """Columns cut between groups' scales and their codes."""
    made, x = matrix(format, 40, seed=3, scale=0.75), inputs()
    total = torch.zeros(5, 40)
    for rank, share in enumerate(x.chunk(n_ranks, dim=-1)):
        with on_rank(rank, n_ranks):
            total += apply(row(made, quantization(format)), share)
    close(total, x @ made.dequantize().t())


@pytest.mark.parametrize(
    ("format", "n_ranks", "message"),
    [
        ("int4", 4, "48 columns are no multiple of the 32"),
        ("nvfp4", 8, "24 columns .* the 16"),
        ("int4", 3, "64 columns .* the 192"),
    ],
)
def test_a_share_of_half_a_group_is_refused(format: str, n_ranks: int, message: str) -> None:
    """Codes of one group under the scale of the next."""
    config = quantization(format)
    if "192" in message:  # one scale for a whole row
        config.target_scheme_map["Linear"]["weights"].strategy = "channel"
    with on_rank(0, n_ranks), pytest.raises(ModelLoadError, match=message):
        row(matrix(format, 40, seed=3), config)


def test_zero_points_are_not_cut_within_a_word() -> None:
    """Eight rows share a word: a rank of twelve rows would read its neighbour's zero points."""
    made = [matrix("int4-asym", 24, seed=1), matrix("int4-asym", 24, seed=2)]
    with on_rank(0, 2), pytest.raises(ModelLoadError, match="8 rows together"):
        merged(made, quantization("int4-asym"), sizes=[24, 24])


# --- what else a folder can say


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4", "fp8"])
def test_inputs_are_rounded_where_the_folder_says_so(format: str) -> None:
    """W4A8 served as W4A16: better numbers than those that were measured and published."""
    made, x = matrix(format, 40, seed=3), inputs()
    with on_rank(0, 1):
        layer = row(made, quantization(format, activations="fp8"))
    rounded = fp8.rounded_rows(x)
    if isinstance(made, Packed):
        close(apply(layer, x), reference.matmul(x, made, activations="fp8"))
    else:
        close(apply(layer, x), rounded @ made.dequantize().t())
    assert not torch.allclose(apply(layer, x), x @ made.dequantize().t(), rtol=1e-3, atol=1e-3)


def factors(folder: Path, **shapes: tuple[int, int]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a file of low-rank factors and, of each matrix, what they add to it."""
    from trimtab.serving.engines.vllm.low_rank import LowRankFile

    generator = torch.Generator().manual_seed(5)
    tensors, added = {}, {}
    for name, (n_out, rank) in shapes.items():
        up = torch.randn(n_out, rank, generator=generator)
        down = torch.randn(rank, N_IN, generator=generator) / 100
        path = "model.layers.0." + name.replace("__", ".")
        tensors |= {f"{path}.{LORC_A}": up, f"{path}.{LORC_B}": down}
        added[name] = up @ down
    save_file(tensors, folder / LORC_NAME)
    return LowRankFile(folder / LORC_NAME), added


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_factors_are_cut_like_their_matrices(n_ranks: int, tmp_path: Path) -> None:
    """A rank that adds another's rows, or all ranks the whole of it."""
    file, added = factors(tmp_path, q_proj=(128, 4), v_proj=(64, 3), down_proj=(40, 4))
    made = [matrix("nvfp4", HEAD * n, seed=n) for n in (4, 2, 2)]
    down, x = matrix("nvfp4", 40, seed=3), inputs()
    bias = torch.arange(40.0)
    total = torch.zeros(5, 40)
    expected = [x @ one.dequantize().t() for one in made]
    expected[0] += x @ added["q_proj"].t()
    expected[2] += x @ added["v_proj"].t()
    for rank, share in enumerate(x.chunk(n_ranks, dim=-1)):
        with on_rank(rank, n_ranks):
            config = quantization("nvfp4")
            config.low_rank = file
            layer = qkv(made, config, n_heads=4, n_kv=2)
            total += apply(row(down, config), share, bias if rank == 0 else None)
        mine = [whole.chunk(n_ranks, dim=-1)[rank] for whole in expected]
        close(apply(layer, x), torch.cat(mine, dim=-1))
    close(total, x @ (down.dequantize() + added["down_proj"]).t() + bias)
    assert file.untaken() == []


def test_factors_that_nothing_uses_are_an_error(tmp_path: Path) -> None:
    """A correction for a layer of another name, lost without a word."""
    from torch import nn

    from trimtab.serving.engines.vllm.low_rank import check_factors_taken

    file, _ = factors(tmp_path, mlp__down_proj=(40, 4))
    config = quantization("nvfp4")
    config.low_rank = file
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Module()])})})
    check_factors_taken(config, model)  # another stage's layer
    model["model"]["layers"][0].mlp = nn.Module()  # type: ignore[index]
    with pytest.raises(ModelLoadError, match=r"model.layers.0.mlp.down_proj"):
        check_factors_taken(config, model)
    config.apply_vllm_mapper(Mapper(lambda name: name.replace("model.", "text.")))
    check_factors_taken(config, model)
    assert file.take("text.layers.0.mlp.down_proj") is not None
    assert file.untaken() == []


class Mapper:
    """Stands in for vLLM's mapper of a model's names."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.apply_list = lambda names: [rename(name) for name in names]
        self._map_name = rename


# --- checkpoints that are not whole, or not ours


def test_a_matrix_that_never_came_is_an_error() -> None:
    """vLLM looks whether all is loaded in unquantised models only: memory leftovers as weights."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    made = matrix("nvfp4", 48, seed=1)
    with on_rank(0, 1):
        layer = MergedColumnParallelLinear(
            N_IN, [48, 48], bias=False, quant_config=quantization("nvfp4"), prefix="gate_up_proj"
        )
        load(layer, to_tensors(made), 0)
        load(layer, {k: v for k, v in to_tensors(made).items() if k != "weight_scale"}, 1)
        with pytest.raises(ModelLoadError, match="no weight_scale for some of gate_up_proj"):
            ready(layer)


def test_matrices_that_are_one_on_disk_are_one_here() -> None:
    """A fused checkpoint (Phi-3's) whose one tensor scale reaches the first part only."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    made, x = matrix("nvfp4", 96, seed=1, scale=0.7), inputs()
    for rank in range(2):
        with on_rank(rank, 2):
            config = quantization("nvfp4")
            config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
            layer = MergedColumnParallelLinear(
                N_IN, [48, 48], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
            )
            load(layer, to_tensors(made))
            expected = (x @ made.dequantize().t()).unflatten(-1, (2, 2, 24))[:, :, rank]
            close(apply(ready(layer), x), expected.flatten(1))


def test_matrices_of_one_layer_that_differ_are_refused() -> None:
    """Codes of one format read as another's: vLLM takes the first matrix's word for all."""
    config = quantization("nvfp4")
    config.target_scheme_map = {
        "re:.*q_proj": config.target_scheme_map["Linear"],
        "re:.*[kv]_proj": quantization("int4").target_scheme_map["Linear"],
    }
    with on_rank(0, 1), pytest.raises(ModelLoadError, match="unlike each other"):
        qkv([matrix("nvfp4", 32, seed=n) for n in range(3)], config, n_heads=1, n_kv=1)


def test_a_layer_left_out_stays_vllms_own() -> None:
    """A bf16 layer of a mixed folder whose weight nobody reads."""
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

    config = quantization("nvfp4")
    config.ignore = ["model.layers.0.down_proj"]
    with on_rank(0, 1):
        layer = RowParallelLinear(
            N_IN, 40, bias=False, quant_config=config, prefix="model.layers.0.down_proj"
        )
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_compiled_layers_of_one_shape_share_their_code() -> None:
    """A layer's number in the graph: every layer of a large model compiled for itself."""
    made = [matrix("nvfp4", 40, seed=n) for n in range(3)]
    with on_rank(0, 1):
        layers = [row(one, quantization("nvfp4")) for one in made]
    seen: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        seen.append(graph)
        return graph

    def run(x: torch.Tensor, layer: Any) -> torch.Tensor:
        return apply(layer, x)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, dynamic=True, fullgraph=True)
    for layer, one in zip(layers, made, strict=True):
        for x in (inputs(), inputs()[:3]):
            close(compiled(x, layer), x @ one.dequantize().t())
    assert all("quantized_linear" in graph.code for graph in seen)
    assert len({graph.code for graph in seen}) == 1

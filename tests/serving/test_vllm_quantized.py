"""A quantised folder on vLLM gives the embedded engine's numbers, steered and not.

The real model is quantised by rounding into a folder of mixed precision with low-rank corrections.
The reference is the same folder in the embedded engine's loader, float32 in both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_toys import quantise
from steered_batch import PLAIN, WHOLE, SteeredBatch

from trimtab.kernels.formats import format_named, fp8
from trimtab.steering.model.loading import LoadedModel, load_model, located
from trimtab.steering.model.profile import profile_model, ref_without_weights
from trimtab.steering.model.quantized import Matrix, QuantizationFacts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """A folder, and how vLLM runs it."""

    facts: QuantizationFacts
    options: dict[str, Any]
    group_size: int | None = None

    def quantised(self, name: str, weight: torch.Tensor) -> Matrix | None:
        """Return a matrix: the last layer stays as it is, one in three down projections is FP8."""
        number = int(name.split(".")[2])
        if number == 29:
            return None
        if "down_proj" in name and number % 3 == 0:
            return fp8.quantize_matrix(weight)
        scheme = self.facts.scheme
        format = "nvfp4" if scheme == "w4a8" else scheme
        return format_named(format, group_size=self.group_size).quantize(weight)


EAGER = {"enforce_eager": True}
ROUNDED = {"method": "rtn", "lorc_rank": 4}
CASES = {
    "nvfp4": Case(QuantizationFacts("nvfp4", **ROUNDED), EAGER),
    "compiled": Case(QuantizationFacts("nvfp4", **ROUNDED), {}),
    "ranks": Case(
        QuantizationFacts("int4", **ROUNDED), EAGER | {"tensor_parallel_size": 3}, group_size=64
    ),
    "w4a8": Case(QuantizationFacts("w4a8", "fp8", **ROUNDED), EAGER),
}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES[request.param]
    made = tmp_path_factory.mktemp("quantised") / request.param
    source = Path(located("smollm2")[1])
    quantise(source, made, case.quantised, facts=case.facts, rank=case.facts.lorc_rank)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from trimtab.serving.engines.vllm.plugin import register

    register()
    options = CASES[folder.name].options
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with patch.context() as starting:
            # vLLM 0.32 looks for its kernels in all that all modules hold, and ends on llvmlite's
            # library, which is there once drafts have been tested in this process.
            for name in [n for n in sys.modules if n.partition(".")[0] == "llvmlite"]:
                starting.delitem(sys.modules, name)
            made = LLM(
                str(folder),
                dtype="float32",
                max_model_len=256,
                max_num_seqs=8,
                logprobs_mode="raw_logits",
                **options,
            )
        yield made
        made.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def served(*names: str) -> Any:
    """Run a test on these; all but the first case take minutes together."""
    marked = [
        name if name == "nvfp4" else pytest.param(name, marks=pytest.mark.extra) for name in names
    ]
    return pytest.mark.parametrize("folder", marked, indirect=True)


@served("nvfp4", "compiled", "ranks")
def test_both_engines_compute_the_same(folder: Path, llm: Any, smollm2: LoadedModel) -> None:
    """A shard's scales for its neighbour's, a correction lost, FP8 left out, steering beside it."""
    assert llm.llm_engine.vllm_config.model_config.quantization == "trimtab"
    batch = SteeredBatch(load_model(str(folder), device="cpu", dtype="float32"))
    plans = batch.plans(PLAIN | WHOLE)
    batch.check(batch.run(llm, plans, max_tokens=8), plans)
    # Vectors of the original model belong to this one, and the app on vLLM knows that.
    ref = ref_without_weights(str(folder), model_id="smollm2")
    original = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer).ref
    assert ref.fingerprint == original.fingerprint
    assert ref.quantization == CASES[folder.name].facts.label


PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "o_proj": ["o_proj"],
    "down_proj": ["down_proj"],
}


def products(worker: Any) -> dict[str, torch.Tensor]:
    """Return what each linear layer of vLLM's model makes of a drawn input."""
    found = {}
    for name, layer in worker.model_runner.get_model().named_modules():
        if name.rpartition(".")[2] in PARTS:
            found[name] = layer.quant_method.apply(layer, drawn(layer.input_size))
    return found


def drawn(width: int) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(width))


@served("w4a8")
def test_every_layer_computes_the_same(folder: Path, llm: Any) -> None:
    """Inputs that are not rounded to FP8.

    Layers alone are compared, because the logits cannot be: a difference in the last bit turns a
    rounding over, and a disturbance of 1e-6 moves the embedded engine's own logits by 0.5 (root
    mean square), as far as the other engine is from it.
    """
    embedded = load_model(str(folder), device="cpu", dtype="float32").model
    (found,) = llm.collective_rpc(products)
    assert len(found) == 4 * 30
    for name, product in found.items():
        parent, _, last = name.rpartition(".")
        layers = [embedded.get_submodule(f"{parent}.{part}") for part in PARTS[last]]
        with torch.no_grad():
            expected = torch.cat([layer(drawn(layer.in_features)) for layer in layers], dim=-1)
        error = (product - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 1e-5, (name, float(error))

"""A quantised folder on vLLM gives the embedded engine's numbers, steered and not.

The real model is quantised by rounding into a folder of mixed precision with low-rank corrections.
The reference is the same folder in the embedded engine's loader, float32 in both.
"""

from __future__ import annotations

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
    group_size: int | None = None
    bound: float = 1e-3  # largest difference of a logit; they are up to 36
    options: Any = None

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
CASES = {
    "nvfp4": Case(QuantizationFacts("nvfp4", method="rtn", lorc_rank=4), options=EAGER),
    "compiled": Case(QuantizationFacts("nvfp4", method="rtn", lorc_rank=4), options={}),
    "ranks": Case(
        QuantizationFacts("int4", method="rtn", lorc_rank=4),
        group_size=64,
        options=EAGER | {"tensor_parallel_size": 3},
    ),
    # A difference in the last bit turns a rounding to FP8 over, which is up to 6 % of a value.
    "w4a8": Case(
        QuantizationFacts("w4a8", "fp8", method="rtn", lorc_rank=4), bound=0.5, options=EAGER
    ),
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


EXTRA = [pytest.param(name, marks=pytest.mark.extra) for name in CASES if name != "nvfp4"]


@pytest.mark.parametrize("folder", ["nvfp4", *EXTRA], indirect=True)
def test_both_engines_compute_the_same(folder: Path, llm: Any, smollm2: LoadedModel) -> None:
    """A shard's scales for its neighbour's, a correction lost, FP8 left out, steering beside it."""
    assert llm.llm_engine.vllm_config.model_config.quantization == "trimtab"
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    batch = SteeredBatch(loaded)
    plans = batch.plans(PLAIN | WHOLE)
    case = CASES[folder.name]
    batch.check(batch.run(llm, plans, max_tokens=8), plans, bound=case.bound)
    # Vectors of the original model belong to this one, and the app on vLLM knows that.
    ref = ref_without_weights(str(folder), model_id="smollm2")
    original = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer).ref
    assert ref.fingerprint == original.fingerprint

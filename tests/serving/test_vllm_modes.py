"""Steering where vLLM has several workers, or makes several tokens a step: ranks, stages, drafts.

Every request of a mixed batch is compared with the transformers model (`tests/steered_batch.py`).
The model has nine heads, so its ranks are three. vLLM's CPU worker does not warm a stage up when it
runs eagerly (0.32 stops there), so the stages are traced, without inductor's minute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steered_batch import GATES, PLAIN, SHOWS, TEXTS, WHOLE, WINDOWS, SteeredBatch, distance

from trimtab.serving.engines.base import Request
from trimtab.serving.engines.vllm.plan_wire import readers_of
from trimtab.serving.engines.vllm.support import Support
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.errors import SpecError
from trimtab.steering.model.loading import LoadedModel, located
from trimtab.steering.plan import Plan

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # numba's, while it compiles vLLM's search for n-grams.
    pytest.mark.filterwarnings("ignore:\\s*Encountered the use of a type"),
]

RANK = 4
NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
MODES: dict[str, dict[str, Any]] = {
    "ranks": {"tensor_parallel_size": 3, "enforce_eager": True},
    "drafts": {
        "speculative_config": NGRAMS,
        "enable_lora": True,
        "max_lora_rank": 8,
        # On a CPU vLLM gives a request without an adapter the last place's, if another in the batch
        # has one (index -1 in lora/ops/torch_ops): one place is left empty.
        "max_loras": 2,
        "block_size": 32,
        "enforce_eager": True,
    },
    "stages": {
        "pipeline_parallel_size": 2,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}


@pytest.fixture(scope="module")
def batch(smollm2: LoadedModel) -> SteeredBatch:
    return SteeredBatch(smollm2)


@pytest.fixture(scope="module")
def llm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One engine a mode, its core in this process; the next mode's starts when it is gone."""
    import cloudpickle
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from trimtab.serving.engines.vllm.plugin import register

    register()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for what is asked of workers
    _, source, _ = located("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        made = LLM(
            source,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=16,
            logprobs_mode="raw_logits",
            **MODES[request.param],
        )
        yield made
        made.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def with_mode(name: str) -> Any:
    # Two processes that trace: two minutes of what CI has.
    marks = pytest.mark.extra if name == "stages" else ()
    return pytest.mark.parametrize("llm", [pytest.param(name, marks=marks)], indirect=True)


def support(llm: Any) -> Support:
    return Support.of(llm.llm_engine.vllm_config, llm.collective_rpc("trimtab_facts"))


def asking(plan: Plan | None = None, **more: Any) -> Request:
    return Request("x", tuple(range(1, 9)), SamplingParams(max_tokens=4), plan=plan, **more)


# --- ranks: tensor parallelism


def decisions(worker: Any) -> dict[str, Any]:
    """Return what a worker's gates have decided at each token, of requests it still knows."""
    live = worker._trimtab._live.items()
    return {
        name: (dict(one.request.latched), {k: v.tolist() for k, v in one.request._seen.items()})
        for name, one in live
    }


def break_on(worker: Any, rank: int) -> None:
    """Let steering fail on one rank, at every layer."""

    def crash(*args: Any) -> None:
        raise RuntimeError("out of memory")

    if worker.rank == rank:
        worker._trimtab._steer_stream = crash


def mend(worker: Any) -> None:
    worker._trimtab.__dict__.pop("_steer_stream", None)


@with_mode("ranks")
def test_all_ranks_steer_and_decide_alike(llm: Any, batch: SteeredBatch) -> None:
    """A rank that steers, or opens a gate, otherwise than its peers adds another model's halves."""
    plans = batch.plans(PLAIN | WHOLE | WINDOWS | GATES)
    batch.check(batch.run(llm, plans), plans)
    first, *others = llm.collective_rpc(decisions)
    assert sum(bool(seen) for _, seen in first.values()) == 2  # two gates by token, one by prompt
    assert sum(bool(latched) for latched, _ in first.values()) == 1
    assert len(others) == 2
    assert all(other == first for other in others)


@with_mode("ranks")
def test_a_rank_that_answers_nobody_can_be_asked(llm: Any, batch: SteeredBatch) -> None:
    """Only the first rank's reports reach the app; another's failure would pass for steering."""
    plans = batch.plans({"broken": WHOLE["guided"]})
    llm.collective_rpc(break_on, args=(1,))
    try:
        answers = batch.run(llm, plans, max_tokens=2)
    finally:
        llm.collective_rpc(mend)
    assert answers["broken"].inbox.failure is None
    said = llm.collective_rpc("trimtab_failure_of", args=("broken",))
    assert [why is not None and "out of memory" in why for why in said] == [False, True, False]
    llm.reset_prefix_cache()
    batch.check(batch.run(llm, plans, max_tokens=2), plans)


# --- drafts: speculative decoding; adapters: LoRA


@contextmanager
def rejections() -> Iterator[list[int]]:
    """Collect how many drafts of each row were rejected."""
    found: list[int] = []
    original = WorkerSteering.end

    def end(steering: WorkerSteering, sampled: dict[str, int] | None = None) -> Any:
        for row in steering._rows:
            if row.n_drafts:
                found.append(row.n_drafts + 1 - (sampled or {})[row.id])
        return original(steering, sampled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerSteering, "end", end)
        yield found


@with_mode("drafts")
def test_guessed_tokens_are_steered_like_others(llm: Any, batch: SteeredBatch) -> None:
    """Drafts verified unsteered, windows counted by passes, rejected drafts in the receipt."""
    plans = batch.plans(PLAIN | WHOLE | WINDOWS | GATES)
    with rejections() as rejected:
        answers = batch.run(llm, plans)
    batch.check(answers, plans)
    assert any(rejected)
    assert sum(answer.most_at_once > 1 for answer in answers.values()) >= 3


@with_mode("drafts")
def test_a_failed_request_leaves_nothing_in_the_prefix_cache(llm: Any, batch: SteeredBatch) -> None:
    """Blocks that were to be steered and were not, served to the one who tries again."""

    def crash(*args: Any) -> None:
        raise RuntimeError("out of memory")

    plans = batch.plans({"again": WHOLE["guided"]})
    texts = [TEXTS[1] * 4]  # two blocks and some
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerSteering, "_steer_stream", crash)
        failed = batch.run(llm, plans, texts=texts)["again"]
    assert "out of memory" in str(failed.inbox.failure)
    assert (failed.tokens, failed.reason) == ([], "error")
    for _ in range(2):  # the second time from the cache
        batch.check(batch.run(llm, plans, max_tokens=3, texts=texts), plans)


@with_mode("drafts")
def test_with_drafts_a_probe_is_refused_by_name(llm: Any, batch: SteeredBatch) -> None:
    """One reading for several tokens, or a thinking span found after its tokens were steered."""
    can = support(llm)
    gated = batch.plans(GATES)
    for plan in gated.values():
        can.check(asking(plan))
    readers = tuple(readers_of(gated["token gate"], ()).values())
    with pytest.raises(SpecError, match="speculative") as found:
        can.check(asking(probes=readers))
    assert found.value.param == "probes"
    thinking = {"vectors": [{"id": "a", "apply": {"thinking": False}}]}
    with pytest.raises(SpecError, match="speculative"):
        can.check(asking(batch.plans({"x": thinking})["x"]))


def adapter(folder: Path, model: Any, *, layers: range) -> dict[str, torch.Tensor]:
    """Write a random adapter of some projections, as PEFT does; return what it adds to each."""
    generator = torch.Generator().manual_seed(3)
    names = [
        f"model.layers.{n}.{name}"
        for n in layers
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    tensors, added = {}, {}
    for name in names:
        n_out, n_in = model.get_submodule(name).weight.shape
        a = torch.randn(RANK, n_in, generator=generator) / n_in**0.5
        b = torch.randn(n_out, RANK, generator=generator) / 8
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        added[name] = 2 * b @ a  # alpha over rank is 2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


@contextmanager
def merged(model: Any, added: dict[str, torch.Tensor]) -> Iterator[None]:
    weights = {name: model.get_submodule(name).weight for name in added}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.add_(added[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])


@with_mode("drafts")
def test_an_adapter_is_steered_like_the_model_it_makes(
    llm: Any, batch: SteeredBatch, tmp_path: Path
) -> None:
    """Layers that lose their steering to LoRA's wrappers, or an adapter to ours."""
    from vllm.lora.request import LoRARequest

    added = adapter(tmp_path, batch.model, layers=range(8, 20))
    specs = PLAIN | WHOLE | {"token gate": GATES["token gate"]}
    plans = batch.plans(specs | {f"{name}, adapted": spec for name, spec in specs.items()})
    adapters = {
        name: LoRARequest("random", 1, str(tmp_path)) for name in plans if name.endswith("adapted")
    }
    answers = batch.run(llm, plans, max_tokens=8, adapters=adapters)
    adapted = {name: answer for name, answer in answers.items() if name in adapters}
    batch.check({name: one for name, one in answers.items() if name not in adapters}, plans)
    for name, answer in adapted.items():
        assert distance(answer, batch.reference(answer, plans[name])[0]) >= SHOWS, name
    with merged(batch.model, added):
        batch.check(adapted, plans)


# --- stages: pipeline parallelism


@with_mode("stages")
def test_each_stage_steers_its_own_layers(llm: Any, batch: SteeredBatch) -> None:
    """Layers counted anew in each stage; steering that the graph was traced without."""
    first, second = (facts["layers"] for facts in llm.collective_rpc("trimtab_facts"))
    assert (first, second) == (list(range(15)), list(range(15, 30)))
    plans = batch.plans(PLAIN | WHOLE | WINDOWS)
    batch.check(batch.run(llm, plans), plans)
    assert min(stats["steered_steps"] for stats in llm.collective_rpc("trimtab_stats")) > 0


@with_mode("stages")
def test_across_stages_gates_and_probes_are_refused_by_name(llm: Any, batch: SteeredBatch) -> None:
    """A gate read in one stage stays shut in the other, without a word."""
    can = support(llm)
    for name, plan in batch.plans(GATES).items():
        with pytest.raises(SpecError, match="pipeline") as found:
            can.check(asking(plan))
        assert found.value.param == "steering.when", name
        with pytest.raises(SpecError, match="pipeline") as found:
            can.check(asking(probes=tuple(readers_of(plan, ()).values())))
        assert found.value.param == "probes"
    for plan in batch.plans(WHOLE | WINDOWS).values():
        can.check(asking(plan))

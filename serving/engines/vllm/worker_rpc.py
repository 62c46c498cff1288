"""What a vLLM worker does for us besides running passes: arming itself, and answering the app.

The methods are set on vLLM's `Worker`, so that `collective_rpc` reaches them on every rank.
Arguments are plain values; nothing that arrives is ever unpickled here.
"""

from __future__ import annotations

from typing import Any

from trimtab.serving.engines.vllm.armed_layers import arm, decoder_layers
from trimtab.serving.engines.vllm.low_rank import check_factors_taken
from trimtab.serving.engines.vllm.runner_hooks import hook_runner
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering


def load_and_arm(original: Any, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for `Worker.load_model`: before anything is profiled, compiled or captured."""
    result = original(worker, *args, **kwargs)
    config = worker.vllm_config
    runner = worker.model_runner
    check_factors_taken(config.quant_config, runner.get_model())
    text = config.model_config.hf_text_config
    n_layers = int(text.num_hidden_layers)
    layers = decoder_layers(runner.get_model(), n_layers=n_layers)
    steering = WorkerSteering(
        layers=layers,
        n_layers=n_layers,
        hidden_size=config.model_config.get_hidden_size(),
        device=runner.device,
        max_requests=config.scheduler_config.max_num_seqs,
    )
    arm(layers, steering)
    hook_runner(runner, steering)
    worker._trimtab = steering
    return result


def _facts(worker: Any) -> dict[str, Any]:
    """Say what this worker is: its layers, its rank, whether its host knows a pass's tokens."""
    steering: WorkerSteering = worker._trimtab
    runner = worker.model_runner
    return {
        "layers": sorted(steering.layers),
        "n_layers": steering.n_layers,
        "runner": "second" if hasattr(runner, "prepare_inputs") else "first",
        "knows_tokens": not getattr(runner, "use_async_scheduling", True),
        "max_rows": steering.bank.max_rows,
        "max_slots": steering.bank.max_slots,
        "max_low_rank": steering.bank.max_low_rank,
        "max_guides": steering.bank.max_guides,
    }


def _learn(worker: Any, digest: str, network: dict[str, Any]) -> None:
    worker._trimtab.learn(digest, network)


def _take_norms(worker: Any, name: str = "") -> list[list[Any]]:
    """Return [request id, layer, |h| of each token] of a measuring request, once it has ended.

    Args:
        name: what its sender called it; vLLM's id begins with it.
    """
    norms = worker._trimtab.take_norms(name)
    return [[name, n, values] for name, by_layer in norms.items() for n, values in by_layer.items()]


def _failure_of(worker: Any, name: str) -> str | None:
    """Say why this worker gave up on a request. Only one rank's reports ride with its tokens."""
    found: str | None = worker._trimtab.failure_of(name)
    return found


def _stats(worker: Any) -> dict[str, int]:
    return dict(worker._trimtab.stats())


WORKER_METHODS = {
    "trimtab_facts": _facts,
    "trimtab_learn": _learn,
    "trimtab_take_norms": _take_norms,
    "trimtab_failure_of": _failure_of,
    "trimtab_stats": _stats,
}

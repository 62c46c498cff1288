"""vLLM's configuration, made to fit steering, or refused with the option that does not."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from trimtab.serving.engines.vllm.armed_layers import OP, OP_ALONE
from trimtab.steering.errors import ModelLoadError


def fit_config(original: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Stand in for `VllmConfig.__post_init__`.

    Raises:
        ModelLoadError: an option rearranges a pass's tokens, so that they could not be told apart.
    """
    original(config, *args, **kwargs)
    if config.model_config is None or getattr(config.model_config, "is_submodel_config", False):
        return
    problem = _problem(config)
    if problem is not None:
        raise ModelLoadError(f"trimtab cannot steer with {problem}. TRIMTAB_VLLM=off serves so.")
    extra = config.additional_config
    if isinstance(extra, dict):
        # Part of the compile cache's key: code compiled with the op must not be found without it.
        extra.setdefault("trimtab", version("trimtab"))
    _split_graphs(config)


def _problem(config: Any) -> str | None:
    parallel, scheduler, cache = (
        config.parallel_config,
        config.scheduler_config,
        config.cache_config,
    )
    if getattr(parallel, "enable_dbo", False):
        return "--enable-dbo (dual-batch overlap halves a pass)"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "--prefill-context-parallel-size (a rank sees a part of the tokens)"
    if getattr(cache, "kv_sharing_fast_prefill", False):
        return "--kv-sharing-fast-prefill (late layers see a part of the tokens)"
    if getattr(config.speculative_config, "enable_adaptive_verification", False):
        return "adaptive verification (drafts are moved on the device)"
    if getattr(scheduler, "runner_type", "generate") != "generate":
        return "a model that does not generate"
    return None


def _split_graphs(config: Any) -> None:
    """Keep the op out of CUDA graphs, where it would be replayed without being called.

    Nobody could vouch for it then, and gates, probes and guidance launch what the batch asks for
    (docs/scaling.md says what full graphs would need). Piecewise graphs are already split at every
    attention; the op splits them once more a layer, runs as plain code and costs nothing on the
    device while nobody is steered.
    """
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        is_piecewise = mode is not None and mode.requires_piecewise_compilation()
    else:
        compilation.cudagraph_mode = type(mode).PIECEWISE
        is_piecewise = True
    if is_piecewise and compilation.splitting_ops:
        for op in (OP, OP_ALONE):
            if op not in compilation.splitting_ops:
                compilation.splitting_ops.append(op)

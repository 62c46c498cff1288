"""The engine that `trimtab serve` runs, from its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trimtab.serving.engines.base import Engine

GIB = 2**30
ENGINES = ("transformers", "vllm")


def engine_of(model: str, options: dict[str, Any], *, vllm_flags: list[str]) -> Engine:
    """Return the engine, not yet started.

    Args:
        model: what to serve.
        options: the command's.
        vllm_flags: options that are vLLM's own.

    Raises:
        click.UsageError: options that do not go together.
    """
    if options["engine"] == "vllm":
        return _vllm(model, options, vllm_flags)
    from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
    from trimtab.steering.model.loading import load_model

    cache_gb = options["cache_gb"]
    return TransformersEngine(
        lambda: load_model(model, device=options["device"], dtype=options["dtype"]),
        config=EngineConfig(
            max_concurrent=options["max_concurrent"],
            max_queue=options["max_queue"],
            max_slots=options["max_slots"],
            cache_bytes=None if cache_gb is None else int(cache_gb * GIB),
        ),
    )


def _vllm(model: str, options: dict[str, Any], flags: list[str]) -> Engine:
    if options["device"] != "auto":
        raise click.UsageError(
            "--device is for --engine transformers; vLLM takes the devices it was built for "
            "(CUDA_VISIBLE_DEVICES chooses among them)."
        )
    # Before vLLM is imported: its own messages, and a report of usage that it would send home.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from trimtab.serving.engines.vllm.engine import VllmConfig, VllmEngine
    from trimtab.ui.vllm_flags import vllm_options

    chosen: dict[str, Any] = {
        "max_num_seqs": options["max_concurrent"],
        "dtype": options["dtype"],
    }
    if options["cache_gb"] is not None:
        chosen["kv_cache_memory_bytes"] = int(options["cache_gb"] * GIB)
    config = VllmConfig(max_queue=options["max_queue"], options=chosen | vllm_options(flags))
    return VllmEngine(model, config=config)

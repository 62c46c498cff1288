"""Tokens a second of the embedded engine, arm by arm, on random weights."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shapes import random_model, shapes, tokenizer
from steered_arms import ArmPlans, random_prompts

from trimtab.serving.engines.base import Request
from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.plan import Plan

N_TOKENS = 32
N_PROMPT = 64
REPEATS = 3
RESERVE_S = 200.0  # left for what comes after, where vLLM is there


def embedded(
    device: torch.device, *, tiny: bool, left_s: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Measure every shape; a shape that does not fit or has no time left says so."""
    results: dict[str, dict[str, Any]] = {}
    for name, config in shapes(tiny=tiny).items():
        if left_s() < RESERVE_S / 4:
            results[name] = {"left_out": "no time"}
            continue
        try:
            results[name] = asyncio.run(_measured(config, device, tiny=tiny, left_s=left_s))
        except torch.OutOfMemoryError as error:
            results[name] = {"left_out": str(error).splitlines()[0]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


async def _measured(
    config: Any, device: torch.device, *, tiny: bool, left_s: Callable[[], float]
) -> dict[str, Any]:
    levels = (1, 4) if tiny else (1, 8, 32, 256)
    dtype = torch.float32 if tiny else torch.bfloat16

    def load() -> LoadedModel:
        model = random_model(config, device=device, dtype=dtype)
        return LoadedModel(model, tokenizer(), "random", None, device, dtype, {})

    cache = max(levels) * 256 * 2 * config.num_hidden_layers * config.num_key_value_heads
    cache *= config.hidden_size // config.num_attention_heads * dtype.itemsize
    sizes = EngineConfig(max_concurrent=max(levels), max_slots=4 * max(levels), cache_bytes=cache)
    engine = TransformersEngine(load, config=sizes)
    await engine.start()
    try:
        arms = ArmPlans(
            engine.info.hidden_norms.tolist(), width=config.hidden_size, most=max(levels)
        )
        speeds: dict[int, Any] = {}
        for n in levels:
            if left_s() < RESERVE_S / 4:
                speeds[n] = {"left_out": "no time"}
                continue
            speeds[n] = await _level(engine, arms, n)
            print(f"embedded, {n} at once: {speeds[n]}", file=sys.stderr, flush=True)
        return {"choices": engine.info.choices, "tokens_per_second": speeds}
    finally:
        await engine.stop()


async def _level(engine: TransformersEngine, arms: ArmPlans, n: int) -> dict[str, Any]:
    """Return each arm's median speed, and its ratio to the idle runs before and after it."""
    runs: dict[str, list[float]] = {"idle": []}
    ratios: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):
        before = await _speed(engine, [None] * n)
        for name, plans in arms.plans.items():
            speed = await _speed(engine, plans[:n])
            after = await _speed(engine, [None] * n)
            if repeat:  # the first round warms up
                runs.setdefault(name, []).append(speed)
                runs["idle"].append(after)
                ratios.setdefault(name, []).append(speed * (1 / before + 1 / after) / 2)
            before = after
    return {
        name: {"speed": round(statistics.median(speeds), 1)}
        | ({"of_idle": round(statistics.median(ratios[name]), 3)} if name in ratios else {})
        for name, speeds in runs.items()
    }


async def _speed(engine: TransformersEngine, plans: Sequence[Plan | None]) -> float:
    sampling = SamplingParams(max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True)
    prompts = random_prompts(len(plans), length=N_PROMPT)
    begin = time.perf_counter()
    streams = engine.generate(
        *(
            Request(f"bench-{i}", ids, sampling, plan)
            for i, (ids, plan) in enumerate(zip(prompts, plans, strict=True))
        )
    )

    async def drain(stream: Any) -> int:
        return sum([len(delta.token_ids) async for delta in stream])

    counts = await asyncio.gather(*(drain(stream) for stream in streams))
    if sum(counts) != N_TOKENS * len(plans):
        raise RuntimeError(f"{sum(counts)} tokens came instead of {N_TOKENS * len(plans)}")
    return sum(counts) / (time.perf_counter() - begin)

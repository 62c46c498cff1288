"""`trimtab bench`: what steering costs on this machine, as a ratio in one run."""

from __future__ import annotations

import asyncio
import shlex
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, loading_options, model_argument
from trimtab.ui.terminal import next_steps, out, out_json, say, stages, table

if TYPE_CHECKING:
    from trimtab.serving.engines.transformers.engine import TransformersEngine
    from trimtab.steering.plan import Plan

ARMS = ("unsteered", "idle", "alike", "different")
DOSE = 0.05  # of the hidden norm: real work for the op, while the text stays ordinary
TOPICS = (
    "a lighthouse", "the tides", "a bakery", "old maps", "a mountain railway", "beekeeping",
    "a village school", "glass", "rain", "a wooden boat", "clocks", "a market day",
)  # fmt: skip


def _levels(ctx: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,8,32.") from None
    if not all(1 <= level <= 256 for level in levels):
        raise click.BadParameter("each must be from 1 to 256.")
    return levels


@click.command(
    cls=HelpfulCommand,
    examples=(
        "trimtab bench",
        "trimtab bench --concurrency 4 --tokens 16 --repeats 1",
        "trimtab bench --json",
    ),
)
@model_argument
@click.option(
    "--concurrency",
    "levels",
    default="1,8,32",
    show_default=True,
    callback=_levels,
    help="How many requests at once; a list with commas.",
)
@click.option(
    "--tokens", default=64, show_default=True, type=click.IntRange(2), help="Tokens a request."
)
@click.option(
    "--repeats", default=3, show_default=True, type=click.IntRange(1), help="Rounds; medians count."
)
@loading_options
@json_option
def bench(
    model: str,
    levels: list[int],
    tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure tokens per second, steered and not, through the embedded engine.

    unsteered: nobody is steered. idle: nobody is, while other plans wait in the bank. alike: all
    requests share one random direction. different: every request has its own. The arms take turns
    and medians are reported; nothing else should run on the machine.
    """
    from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
    from trimtab.steering.model.loading import load_model
    from trimtab.ui.server_log import quiet_start

    quiet_start()
    say(f"Loading {model} ...")
    engine = TransformersEngine(
        lambda: load_model(model, device=device, dtype=dtype),
        config=EngineConfig(max_concurrent=max(levels), max_slots=max(256, *levels)),
    )
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def wait_for(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    wait_for(engine.start())
    try:
        measured = _measure(engine, wait_for, levels=levels, n_tokens=tokens, repeats=repeats)
    finally:
        wait_for(engine.stop())
        loop.call_soon_threadsafe(loop.stop)
    facts = {"model": model, "tokens": tokens, "repeats": repeats, "choices": engine.info.choices}
    if as_json:
        results = [{"concurrency": n, **row} for n, row in measured.items()]
        out_json({**facts, "tokens_per_second": results})
        return
    rows = [
        (n, *(f"{row[arm]:.1f}" for arm in ARMS), *(_ratio(row, arm) for arm in ARMS[1:]))
        for n, row in measured.items()
    ]
    header = ("at once", *ARMS, *(f"{arm}/unsteered" for arm in ARMS[1:]))
    out(f"Tokens per second, {engine.info.choices.get('dtype', '')}")
    out(table(header, rows))
    next_steps(f"trimtab serve {shlex.quote(model)}")


def _ratio(row: dict[str, float], arm: str) -> str:
    return f"{row[arm] / row['unsteered']:.3f}"


def _measure(
    engine: TransformersEngine,
    wait_for: Callable[[Coroutine[Any, Any, Any]], Any],
    *,
    levels: Sequence[int],
    n_tokens: int,
    repeats: int,
) -> dict[int, dict[str, float]]:
    """Return concurrency -> arm -> median tokens per second."""
    prompts = _prompts(engine.info.tokenizer, max(levels))
    plans = _plans(engine, max(levels))
    measured: dict[int, dict[str, float]] = {}
    with stages() as stage:
        for n in levels:
            runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for repeat in range(repeats + 1):
                # The order moves on each round, so that no arm always follows the same one.
                turn = repeat % len(ARMS)
                for i, arm in enumerate((*ARMS[turn:], *ARMS[:turn])):
                    stage(f"{n} at once", repeat * len(ARMS) + i, (repeats + 1) * len(ARMS))
                    speed = _run(engine, wait_for, arm, prompts[:n], plans[:n], n_tokens=n_tokens)
                    if repeat:  # the first round warms up
                        runs[arm].append(speed)
            stage(f"{n} at once", (repeats + 1) * len(ARMS), (repeats + 1) * len(ARMS))
            measured[n] = {arm: statistics.median(values) for arm, values in runs.items()}
    return measured


def _run(
    engine: TransformersEngine,
    wait_for: Callable[[Coroutine[Any, Any, Any]], Any],
    arm: str,
    prompts: Sequence[tuple[int, ...]],
    plans: Sequence[Plan],
    *,
    n_tokens: int,
) -> float:
    n = len(prompts)
    bank = engine.bank
    assert bank is not None  # the engine has started
    leases = [bank.acquire(plan) for plan in plans] if arm == "idle" else []
    used: dict[str, list[Plan | None]] = {"alike": [plans[0]] * n, "different": list(plans)}
    try:
        speed: float = wait_for(
            _generated(engine, prompts, used.get(arm, [None] * n), n_tokens=n_tokens)
        )
    finally:
        for lease in leases:
            if lease is not None:
                bank.release(lease)
    return speed


async def _generated(
    engine: TransformersEngine,
    prompts: Sequence[tuple[int, ...]],
    plans: Sequence[Plan | None],
    *,
    n_tokens: int,
) -> float:
    from trimtab.serving.engines.base import Request
    from trimtab.serving.sampling import SamplingParams

    sampling = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    streams = engine.generate(
        *(
            Request(f"bench-{i}", ids, sampling, plan)
            for i, (ids, plan) in enumerate(zip(prompts, plans, strict=True))
        )
    )

    async def drained(stream: Any) -> int:
        return sum([len(delta.token_ids) async for delta in stream])

    counts = await asyncio.gather(*map(drained, streams))
    return sum(counts) / (time.perf_counter() - began)


def _prompts(tokenizer: Any, n: int) -> list[tuple[int, ...]]:
    texts = [
        f"Write part {i // len(TOPICS) + 1} of a story about {TOPICS[i % len(TOPICS)]}."
        for i in range(n)
    ]
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def _plans(engine: TransformersEngine, n: int) -> list[Plan]:
    """Return n plans with a random direction each at the middle layer."""
    import torch

    from trimtab.steering.plan import additive_plan

    info = engine.info
    layer = len(info.hidden_norms) // 2
    rows = torch.randn(n, info.model.hidden_size, generator=torch.Generator().manual_seed(0))
    length = DOSE * float(info.hidden_norms[layer])
    return [additive_plan({layer: row / row.norm() * length}) for row in rows]

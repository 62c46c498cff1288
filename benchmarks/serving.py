"""Throughput of the embedded engine, steered and not, against today's sequential hooked loop.

    python benchmarks/serving.py                       # SmolLM2-135M, bf16, about ten minutes
    python benchmarks/serving.py --repeats 3 --tokens 32 --concurrency 1,8

All arms run in one process on the same weights, alternating, and medians are reported:

    generate      transformers' `generate`, one request after another, unsteered
    hooked loop   the same with forward hooks that add a vector: what steering libraries do
    plain         this engine with its steering taken out
    idle          this engine, no request steered, other plans live in the bank
    alike         every request steered by the same plan, one layer
    different     every request steered by its own plan, one layer
    heavy         every request its own four vectors summed on all layers, norm preserved
    guided        every request its own labels of a classifier (128 hidden units, 16 labels), one
                  layer, three steps
    probed        nobody steered, everybody's tokens read by that classifier

Nothing else should run on the machine: with contended cores OpenMP threads collapse.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from steered_arms import ArmPlans, prompts

from trimtab.serving.engines.base import Request
from trimtab.serving.engines.transformers import runner as runner_module
from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.model.loading import load_model
from trimtab.steering.plan import Plan, Reader

RATIOS = (
    ("plain", "generate"),
    ("idle", "plain"),
    ("different", "hooked loop"),
    ("different", "idle"),
    ("heavy", "idle"),
    ("guided", "idle"),
    ("probed", "idle"),
)


class Arms:
    """The arms to compare, each a function of the number of requests returning tokens / s."""

    def __init__(self, engine: TransformersEngine, *, n_tokens: int, most: int) -> None:
        assert engine.loaded is not None
        assert engine.profile is not None
        self.engine = engine
        self.model = engine.loaded.model
        self.layers = engine.profile.layers
        self.norms = engine.profile.hidden_norms
        self.n_tokens = n_tokens
        self.ids = prompts(engine.loaded.tokenizer, most)
        asked = ArmPlans(self.norms.tolist(), width=engine.profile.ref.hidden_size, most=most)
        self.rows, self.layer = asked.rows, asked.layer
        self.different = asked.plans["different"]
        self.arms: dict[str, Callable[[int], float]] = {
            "generate": self.generate,
            "hooked loop": self.hooked_loop,
            "plain": self.plain,
            "idle": self.idle,
            "alike": lambda n: self.served([self.different[0]] * n),
            "different": lambda n: self.served(list(self.different[:n])),
            "heavy": lambda n: self.served(list(asked.plans["four"][:n])),
            "guided": lambda n: self.served(list(asked.plans["guided"][:n])),
            "probed": lambda n: self.served([None] * n, probes=(asked.reader,)),
        }

    # --- transformers alone

    def generate(self, n: int) -> float:
        """One `generate` call after another."""
        begin = time.perf_counter()
        with torch.inference_mode():
            for ids in self.ids[:n]:
                x = torch.tensor([ids])
                self.model.generate(
                    x,
                    attention_mask=torch.ones_like(x),
                    max_new_tokens=self.n_tokens,
                    min_new_tokens=self.n_tokens,
                    do_sample=False,
                )
        return n * self.n_tokens / (time.perf_counter() - begin)

    def hooked_loop(self, n: int) -> float:
        """The same, each request with its own vector added by a forward hook."""
        total = 0.0
        for i in range(n):
            vector = self.rows[i * 4] * 0.1 * float(self.norms[self.layer])
            vector = vector.to(self.model.dtype)
            hook = self.layers[self.layer].register_forward_hook(
                lambda module, inputs, output, v=vector: (
                    (output[0] + v, *output[1:]) if isinstance(output, tuple) else output + v
                )
            )
            begin = time.perf_counter()
            with torch.inference_mode():
                x = torch.tensor([self.ids[i]])
                self.model.generate(
                    x,
                    attention_mask=torch.ones_like(x),
                    max_new_tokens=self.n_tokens,
                    min_new_tokens=self.n_tokens,
                    do_sample=False,
                )
            total += time.perf_counter() - begin
            hook.remove()
        return n * self.n_tokens / total

    # --- this engine

    def served(self, plans: list[Plan | None], *, probes: tuple[Reader, ...] = ()) -> float:
        """All requests at once through the engine."""
        return asyncio.run_coroutine_threadsafe(self._served(plans, probes), _LOOP).result()

    async def _served(self, plans: list[Plan | None], probes: tuple[Reader, ...]) -> float:
        sampling = SamplingParams(max_tokens=self.n_tokens, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        streams = self.engine.generate(
            *(
                Request(f"bench-{i}", self.ids[i], sampling, plan, probes)
                for i, plan in enumerate(plans)
            )
        )

        async def drain(stream: Any) -> int:
            return sum([len(delta.token_ids) async for delta in stream])

        counts = await asyncio.gather(*(drain(stream) for stream in streams))
        return sum(counts) / (time.perf_counter() - begin)

    def plain(self, n: int) -> float:
        """The engine with its steering taken out."""
        with _without_steering():
            return self.served([None] * n)

    def idle(self, n: int) -> float:
        """Nobody is steered while other plans live in the bank."""
        bank = self.engine.bank
        assert bank is not None
        leases = [bank.acquire(plan) for plan in self.different]
        try:
            return self.served([None] * n)
        finally:
            for lease in leases:
                if lease is not None:
                    bank.release(lease)


@contextmanager
def _without_steering() -> Any:
    saved = runner_module._step, runner_module.steered

    @contextmanager
    def nothing(layers: Any, step: Any) -> Any:
        yield

    runner_module._step, runner_module.steered = lambda bank, spans: None, nothing  # type: ignore
    try:
        yield
    finally:
        runner_module._step, runner_module.steered = saved


_LOOP = asyncio.new_event_loop()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", help="only these, such as idle,guided")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    levels = [int(x) for x in args.concurrency.split(",")]

    import threading

    threading.Thread(target=_LOOP.run_forever, daemon=True).start()
    engine = TransformersEngine(
        lambda: load_model(args.model, dtype=args.dtype),
        config=EngineConfig(max_concurrent=max(levels)),
    )
    asyncio.run_coroutine_threadsafe(engine.start(), _LOOP).result()
    arms = Arms(engine, n_tokens=args.tokens, most=max(levels))
    if args.arms:
        arms.arms = {name: arms.arms[name] for name in args.arms.split(",")}
    sequential = {"generate", "hooked loop"}
    results: dict[int, dict[str, float]] = {}
    for n in levels:
        runs: dict[str, list[float]] = {name: [] for name in arms.arms}
        for repeat in range(args.repeats + 1):
            order = list(arms.arms)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
                # One after another, so eight requests show the same speed as thirty-two.
                speed = arms.arms[name](min(n, 4) if name in sequential else n)
                if repeat:  # the first round warms up
                    runs[name].append(speed)
            print(f"concurrency {n}: round {repeat}/{args.repeats}", file=sys.stderr)
        results[n] = {name: statistics.median(values) for name, values in runs.items()}
    asyncio.run_coroutine_threadsafe(engine.stop(), _LOOP).result()

    facts = {
        "model": args.model,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    names = list(arms.arms)
    print("tokens/s     " + "".join(f"{name:>13}" for name in names))
    for n, row in results.items():
        print(f"{n:>3} at once  " + "".join(f"{row[name]:>13.1f}" for name in names))
    print("ratios")
    for n, row in results.items():
        shown = [
            f"{one}/{other} {row[one] / row[other]:.3f}"
            for one, other in RATIOS
            if one in row and other in row
        ]
        print(f"{n:>3} at once   " + "   ".join(shown))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"facts": facts, "tokens_per_second": results}, file, indent=1)


if __name__ == "__main__":
    main()

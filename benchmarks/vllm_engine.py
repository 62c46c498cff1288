"""Throughput of vLLM with trimtab's steering, request by request steered, against plain vLLM.

    python benchmarks/vllm_engine.py                     # SmolLM2-135M, bf16, eager, ten minutes
    python benchmarks/vllm_engine.py --compiled --concurrency 8 --repeats 5
    python benchmarks/vllm_engine.py --profile four --concurrency 1,8

Two processes hold an engine each: one without any plugin, one with trimtab's. They are
asked in turn, so that the other sleeps; before and after every run of the steered one the plain one
runs, and a ratio is to the mean of those two. Medians over all rounds:

    plain         vLLM as it is
    idle          with the plugin, nobody steered
    different, four, guided: see `steered_arms.py`

Every request makes the same number of tokens, whatever they are, and nothing is remembered between
runs. `wall` is tokens a second of the whole run, prompts included; `decode` counts from the first
token of the last request on; `cpu` compares the processes' own time; `quiet` compares the quickest
of each decoding pass over the rounds, which is what a busy machine blurs least. With `--through
engine` requests go the app's way instead, VllmEngine and vLLM's own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

from vllm_cores import Run, Setting, serve

STEERED = ("idle", "different", "four", "guided")
BUDGETS = {"idle": 0.99, "different": 0.97, "four": 0.93, "guided": 0.95}


# Which of vLLM's plugins a process may load. `hotwire` is hotwire-vllm, for comparison.
PLUGINS = {"plain": "", "steered": "trimtab", "hotwire": "hotwire"}


class Core:
    """An engine in a process of its own, asked over a pipe."""

    def __init__(self, setting: Setting, kind: str, *, threads: int) -> None:
        os.environ |= {
            "TRIMTAB_VLLM": "on" if kind == "steered" else "off",
            "VLLM_PLUGINS": PLUGINS[kind],
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, setting, kind))
        self._process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        """Have a method of `vllm_cores` called and return its result."""
        self._pipe.send(command)
        return self.answer()

    def answer(self) -> Any:
        """Return what the last command gave; the first answer is the engine's facts."""
        kind, value = self._pipe.recv()
        if kind == "failed":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.kill()


@dataclass
class Measured:
    """One level's runs of every arm."""

    runs: dict[str, list[Run]]
    beside: dict[str, list[tuple[Run, Run]]]  # the plain runs before and after each run

    def speed(self, name: str) -> float:
        """Return an arm's median tokens a second."""
        return statistics.median(run.speed for run in self.runs[name])

    def ratios(self, name: str) -> dict[str, float]:
        """Return an arm's speeds over the plain engine's; below 1 is slower."""
        pairs = list(zip(self.runs[name], self.beside[name], strict=True))
        ratios = {
            kind: statistics.median(
                (getattr(before, field) + getattr(after, field)) / 2 / getattr(run, field)
                for run, (before, after) in pairs
            )
            for kind, field in (("wall", "seconds"), ("decode", "decode_s"), ("cpu", "cpu_s"))
        }
        plain = [after for _, (_, after) in pairs]
        return ratios | {"quiet": _quickest(plain) / _quickest(self.runs[name])}


def _quickest(runs: list[Run]) -> float:
    """Return the sum over decoding passes of each one's quickest time."""
    return sum(min(times) for times in zip(*(run.passes_s for run in runs), strict=False))


def measure(plain: Core, steered: Core, n: int, *, arms: list[str], repeats: int) -> Measured:
    """Run all arms in turn, a plain run between any two; the first round warms up."""
    measured = Measured({name: [] for name in ("plain", *arms)}, {name: [] for name in arms})
    for repeat in range(repeats + 1):
        before = plain.ask("run", "plain", n)
        turn = repeat % len(arms)
        for name in arms[turn:] + arms[:turn]:
            run = steered.ask("run", name, n)
            after = plain.ask("run", "plain", n)
            if repeat:
                measured.runs[name].append(run)
                measured.runs["plain"].append(after)
                measured.beside[name].append((before, after))
            before = after
        print(f"{n} at once: round {repeat}/{repeats}", file=sys.stderr, flush=True)
    return measured


def _profile(setting: Setting, arms: list[str], levels: list[int], *, threads: int) -> None:
    core = Core(setting, "steered", threads=threads)
    try:
        core.answer()
        for n in levels:
            for name in arms:
                core.ask("run", name, n)
                print(f"== {name}, {n} at once\n{core.ask('profile', name, n)}", flush=True)
    finally:
        core.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile, not eager")
    parser.add_argument("--through", choices=("core", "engine"), default="core")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", default=",".join(STEERED))
    parser.add_argument("--profile", metavar="ARMS", help="say where these arms' time goes instead")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    levels = [int(x) for x in args.concurrency.split(",")]
    setting = Setting(args.model, args.dtype, args.compiled, max(levels), args.tokens, args.through)
    if args.profile:
        _profile(setting, args.profile.split(","), levels, threads=args.threads)
        return
    plain = Core(setting, "plain", threads=args.threads)
    facts = plain.answer()
    steered = Core(setting, "steered", threads=args.threads)
    try:
        steered.answer()
        results: dict[int, Measured] = {}
        for n in levels:
            found = measure(plain, steered, n, arms=args.arms.split(","), repeats=args.repeats)
            results[n] = found
            print(_table(rows_of({n: found})), flush=True)
    finally:
        plain.close()
        steered.close()
    facts |= asdict(setting) | {
        "repeats": args.repeats,
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    _show(results, facts, file=args.json)


def rows_of(results: dict[int, Measured]) -> dict[int, dict[str, dict[str, float]]]:
    """Return each level's arms: median tokens a second, and ratios to the plain engine."""
    return {
        n: {
            name: {
                "tokens_per_second": found.speed(name),
                **({} if name == "plain" else found.ratios(name)),
            }
            for name in found.runs
        }
        for n, found in results.items()
    }


def _table(rows: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = []
    for n, row in rows.items():
        for name, one in row.items():
            ratios = "   ".join(f"{k} {v:.3f}" for k, v in one.items() if k != "tokens_per_second")
            budget = f"   budget {BUDGETS[name]}" if name in BUDGETS else ""
            speed = one["tokens_per_second"]
            lines.append(f"{n:>4} at once  {name:<10}{speed:>8.1f} tokens/s   {ratios}{budget}")
    return "\n".join(lines)


def _show(results: dict[int, Measured], facts: dict[str, Any], *, file: str | None) -> None:
    line = json.dumps({"facts": facts, "levels": rows_of(results)})
    print(line)
    if file:
        with open(file, "w", encoding="utf-8") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()

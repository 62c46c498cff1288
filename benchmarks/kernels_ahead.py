"""Compile every Triton kernel for Hopper without a GPU, and read the machine code.

    python benchmarks/kernels_ahead.py                 # a table; exit code 1 if a gate is missed
    python benchmarks/kernels_ahead.py --json          # the same for a program
    python benchmarks/kernels_ahead.py --only w4a8 --architecture 100

TRITON_INTERPRET must be unset. Gates: no spills, shared memory within a multiprocessor's, tensor
cores used where a kernel multiplies, and instructions a weight where it decodes weights (how many
Hopper can issue while 4.3 TB/s bring the weights: methods and limits beside each case).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

# The benchmarks' own modules, also where PYTHONSAFEPATH keeps this folder off the path.
for _folder in (Path(__file__).parent / "ahead",):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from compiling import Case, Compiled, compile_ahead  # noqa: E402

FAMILIES = {"matmul": "matmul_cases:cases", "steering": "steering_cases:cases"}
"""Where each family of kernels lists its cases: a module of `ahead/` and a function in it."""


def cases(families: list[str]) -> list[Case]:
    """Return the cases of some families."""
    found: list[Case] = []
    for family in families:
        module, name = FAMILIES[family].split(":")
        listed: Callable[[], list[Case]] = getattr(importlib.import_module(module), name)
        found += listed()
    return found


def line(result: Compiled) -> str:
    """Return one line of the table."""
    it = f"{result.name:44} {result.registers:4} {result.spills:6} {result.shared_bytes:8}"
    it += f" {result.tensor_instructions:5} {result.loop_instructions:6}"
    if result.per_weight is not None:
        it += f" {result.per_weight:6.2f} {result.int_per_weight:6.2f}"
    return it + "".join(f"  MISSED: {missed}" for missed in result.missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a list of results")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="only the cases that have a gate")
    parser.add_argument("--architecture", type=int, help="instead of each case's own; 90, 100, 120")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    results = []
    if not args.json:
        heads = ("kernel", "regs", "spills", "shared", "mma", "loop", "/w", "int/w")
        print("{:44} {:>4} {:>6} {:>8} {:>5} {:>6} {:>6} {:>6}".format(*heads))
    for case in cases(args.families.split(",")):
        if args.only not in case.name or (args.quick and not case.is_gated):
            continue
        if args.architecture:
            case = replace(case, architecture=args.architecture)
        results.append(compile_ahead(case))
        if not args.json:
            print(line(results[-1]), flush=True)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    sys.exit(1 if any(result.missed for result in results) else 0)


if __name__ == "__main__":
    main()

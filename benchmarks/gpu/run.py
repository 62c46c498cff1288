"""Everything that wants measuring on a GPU, in one call of less than nine minutes.

    python benchmarks/gpu/run.py --out "$OUT"            # a GPU; see README.md beside this
    python benchmarks/gpu/run.py --tiny --out /tmp/gpu   # toy shapes on a CPU: does it run at all?

Writes results.json, anew after each section, so that a call that is cut short leaves what it has:

    correct     the ops on the device against float32 on the CPU
    ops         milliseconds of the ops for 1 to 4096 tokens
    matmul      4-bit products: errors, microseconds beside cuBLAS and others, the best tiles
    embedded    tokens a second of the embedded engine, arm by arm, with random weights
    vllm        the same arms on vLLM beside plain vLLM, compiled and with graphs, if it is there
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# The benchmarks' own modules, also where PYTHONSAFEPATH keeps this folder off the path.
for _folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from embedded import embedded  # noqa: E402
from matmul import matmul  # noqa: E402
from on_vllm import on_vllm  # noqa: E402
from ops import correct, timed  # noqa: E402

LIMIT_S = 530.0


def _facts(device: torch.device) -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in ("torch", "transformers", "triton", "vllm", "hotwire-vllm", "trimtab"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30
        if is_cuda
        else None,
        "python": platform.python_version(),
        "packages": packages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU")
    parser.add_argument("--sections", default="correct,ops,matmul,embedded,vllm")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny tries the script on a CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def left_s() -> float:
        return LIMIT_S - (time.monotonic() - begun)

    sections: dict[str, Callable[[], Any]] = {
        "correct": lambda: correct(device, tiny=args.tiny),
        "ops": lambda: timed(device, tiny=args.tiny),
        "matmul": lambda: matmul(device, tiny=args.tiny),
        "embedded": lambda: embedded(device, tiny=args.tiny, left_s=left_s),
        "vllm": lambda: on_vllm(tiny=args.tiny, left_s=left_s),
    }
    results: dict[str, Any] = {"facts": _facts(device), "is_tiny": args.tiny}
    failed = False
    for name in args.sections.split(","):
        at = time.monotonic()
        print(f"{name}: {left_s():.0f} s left", file=sys.stderr, flush=True)
        try:
            results[name] = sections[name]()
        except Exception:
            failed = True
            results[name] = {"failed": traceback.format_exc()}
            traceback.print_exc()
        results.setdefault("seconds", {})[name] = round(time.monotonic() - at, 1)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

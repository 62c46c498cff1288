"""What quantised weights cost or save in time and memory, beside the plain model in one run.

    python benchmarks/quantized_speed.py smollm2 smollm2-nvfp4 smollm2-int4
    python benchmarks/quantized_speed.py smollm2 smollm2-int4 --rounds 9 --json out.json

Each model is read in turn and stays loaded; passes alternate between them, and medians are told as
ratios to the first. A decoding pass is one new token for each of 1, 8 and 32 sequences behind 128
tokens; a prompt pass reads 256. `resident` is what the model's parameters and buffers hold, `file`
what its weights take on disk. The threads are torch's: set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from quantized_perplexity import file_bytes, resident_bytes
from transformers import DynamicCache

from trimtab.steering.model.loading import LoadedModel, load_model

BATCHES = (1, 8, 32)
N_BEFORE = 128
N_PROMPT = 256


def prefilled(model: Any, n_sequences: int) -> DynamicCache:
    """Return a cache of `N_BEFORE` tokens for each sequence."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(N_BEFORE).repeat(n_sequences, 1) % model.config.vocab_size
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode_ms(model: Any, cache: DynamicCache, n_sequences: int) -> float:
    """Return one decoding pass's milliseconds; the cache is left as it was."""
    ids = torch.full((n_sequences, 1), 7, device=model.device)
    at = time.perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    took = time.perf_counter() - at
    cache.crop(-1)
    return 1e3 * took


def prompt_ms(model: Any) -> float:
    """Return the milliseconds of reading `N_PROMPT` tokens."""
    ids = (torch.arange(N_PROMPT) % model.config.vocab_size).unsqueeze(0).to(model.device)
    at = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - at)


@torch.inference_mode()
def measure(models: dict[str, LoadedModel], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds by model and kind of pass, one of each kind a round, models in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for n_sequences in BATCHES:
        caches = {name: prefilled(it.model, n_sequences) for name, it in models.items()}
        kind = f"decode {n_sequences}"
        for name, it in models.items():  # warm
            decode_ms(it.model, caches[name], n_sequences)
        for _ in range(3 * rounds):
            for name, it in models.items():
                took = decode_ms(it.model, caches[name], n_sequences)
                times[name].setdefault(kind, []).append(took)
    kind = f"prompt of {N_PROMPT}"
    for _ in range(rounds):
        for name, it in models.items():
            times[name].setdefault(kind, []).append(prompt_ms(it.model))
    return times


def main() -> None:
    """Load, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the first is what others are compared with")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    models = {name: load_model(name, dtype=args.dtype) for name in args.models}
    times = measure(models, args.rounds)
    medians = {
        name: {kind: statistics.median(ms) for kind, ms in kinds.items()}
        for name, kinds in times.items()
    }
    first = medians[args.models[0]]
    sizes = {
        name: {
            "file": file_bytes(it.source_path or Path(name)),
            "resident": resident_bytes(it.model),
        }
        for name, it in models.items()
    }
    print(f"torch={torch.__version__} threads={torch.get_num_threads()} dtype={args.dtype}")
    print(f"{'model':<28}{'file MB':>9}{'resident MB':>13}" + "".join(f"{k:>16}" for k in first))
    for name in args.models:
        cells = [f"{ms:>8.1f} ({first[k] / ms:.2f}x)" for k, ms in medians[name].items()]
        size = sizes[name]
        print(
            f"{Path(name).name:<28}{size['file'] / 1e6:>9.1f}{size['resident'] / 1e6:>13.1f}"
            + "".join(f"{cell:>16}" for cell in cells)
        )
    if args.json:
        rows = {name: {"ms": medians[name], "bytes": sizes[name]} for name in args.models}
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

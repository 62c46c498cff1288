"""The vLLM engine on a GPU: compiled and with graphs, beside plain vLLM, and hotwire-vllm."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import shapes
from vllm_engine import Core, Setting, measure, rows_of

N_TOKENS = 64
N_PROMPT = 64


def on_vllm(*, tiny: bool, left_s: Callable[[], float]) -> dict[str, Any]:
    """Measure the smallest shape, and the next if there is time."""
    if importlib.util.find_spec("vllm") is None:
        return {"left_out": "vLLM is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        return _all(Path(folder), tiny=tiny, left_s=left_s)


def _all(out: Path, *, tiny: bool, left_s: Callable[[], float]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, config in shapes(tiny=tiny).items():
        if left_s() < 150 and not tiny:
            results[name] = {"left_out": "no time"}
            continue
        folder = out / name
        config.architectures = ["Qwen2ForCausalLM" if "Qwen" in name else "LlamaForCausalLM"]
        config.save_pretrained(folder)
        results[name] = _measured(folder, config, tiny=tiny, left_s=left_s)
    return results


def _measured(
    folder: Path, config: Any, *, tiny: bool, left_s: Callable[[], float]
) -> dict[str, Any]:
    levels = (1, 4) if tiny else (1, 8, 32, 256)
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if not tiny:
        # Two or three engines share the device, a part of its memory for each.
        options |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None}
    setting = Setting(
        str(folder),
        "float32" if tiny else "bfloat16",
        not tiny,
        max(levels),
        N_TOKENS,
        n_prompt=N_PROMPT,
        options=options,
    )
    kinds = ["plain", "steered"]
    if importlib.util.find_spec("hotwire") is not None:
        _hotwire_vectors(folder, config, most=max(levels))
        kinds.append("hotwire")
    cores: dict[str, Core] = {}
    results: dict[str, Any] = {}
    try:
        for kind in kinds:
            cores[kind] = Core(setting, kind, threads=1 if tiny else 8)
            results[f"{kind} engine"] = cores[kind].answer()
        for kind, arms in (
            ("steered", ["idle", "different", "four", "guided"]),
            ("hotwire", ["idle", "different"]),
        ):
            if kind not in cores:
                continue
            for n in levels:
                if left_s() < 30:
                    results.setdefault("left_out", []).append([kind, n])
                    continue
                found = measure(cores["plain"], cores[kind], n, arms=arms, repeats=3)
                results.setdefault(kind, {}).update(rows_of({n: found}))
                print(f"{kind}, {n} at once: {rows_of({n: found})}", file=sys.stderr, flush=True)
    finally:
        for core in cores.values():
            core.close()
    return results


def _hotwire_vectors(folder: Path, config: Any, *, most: int) -> None:
    """Write a vector a request where hotwire reads them, and give it a slot for each."""
    vectors = folder / "vectors"
    vectors.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(most):
        row = torch.randn(config.hidden_size, generator=generator)
        torch.save(row / row.norm(), vectors / f"v{i}.pt")
    os.environ |= {"HOTWIRE_VECTORS": str(vectors), "HOTWIRE_SLOTS": str(most)}

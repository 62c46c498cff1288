"""4-bit products: are they right on this device, how fast, and which tiles are best.

Shapes are those of Llama-3.1-8B's linear layers. Weights of an arm are copied until 300 MB go by
before one is read again, more than an H200's L2 holds, and the calls of one round are captured in a
CUDA graph: a launch costs as much as a small product.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matmul_rivals import RIVALS
from matmul_sweep import sweep

from trimtab.kernels.formats import Packed, format_named, fp8
from trimtab.kernels.matmul import PreparedWeight, prepare, reference

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 16, 64, 256, 1024, 4096)
OURS = (("nvfp4", "same"), ("nvfp4", "fp8"), ("mxfp4", "fp8"), ("int4", "same"))
BYTES_BETWEEN = 300e6
LIMIT_S = 180.0

Call = Callable[[torch.Tensor], torch.Tensor]
Arms = dict[str, tuple[Callable[[int], list[Call]], float]]


def matmul(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return errors, microseconds and the best table, as far as the time allows."""
    begun = time.monotonic()

    def left_s() -> float:
        return LIMIT_S - (time.monotonic() - begun)

    found = {
        "correct": _correct(device, tiny=tiny),
        "speed": _speed(device, _arms, tiny=tiny, left_s=left_s),
        "sweep": sweep(device, tiny=tiny, measure=microseconds, left_s=left_s),
    }
    # Last, because some of them tune themselves for minutes.
    found["speed"] += _speed(device, _rivals, tiny=tiny, left_s=left_s)
    return found | {"speed": _with_ratios(found["speed"])}


def _correct(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Return each case's RMS error relative to the float32 reference's RMS, on the device."""
    cases = []
    shapes = ((64, 256),) if tiny else ((4096, 4096), (1000, 2816))
    for (n_out, n_in), (name, activations) in itertools.product(shapes, OURS):
        packed = _packed(name, n_out, n_in, device)
        for dtype in (torch.bfloat16, torch.float16):
            weight = prepare(packed, dtype=dtype, activations=activations)
            for n_tokens in (1, 7, 16, 64, 65, 300, 1024):
                x = torch.randn(n_tokens, n_in, device=device).to(dtype)
                found = weight(x)
                wanted = reference.matmul(x, packed, activations=activations)
                off = (found.float() - wanted).square().mean().sqrt()
                cases.append(
                    {
                        "kernel": type(weight).__name__,
                        "format": name,
                        "activations": activations,
                        "dtype": str(dtype),
                        "shape": [n_tokens, n_out, n_in],
                        "error": float(off / wanted.square().mean().sqrt()),
                        "is_repeatable": bool(torch.equal(found, weight(x))),
                    }
                )
    return cases


def _speed(
    device: torch.device, arms: Callable[..., Arms], *, tiny: bool, left_s: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return microseconds of a product by shape, tokens and arm."""
    rows: list[dict[str, Any]] = []
    shapes, tokens = (((64, 256),), (1, 16)) if tiny else (SHAPES, TOKENS)
    for n_out, n_in in shapes:
        for name, (make, n_bytes) in arms(n_out, n_in, device).items():
            if left_s() < 0:
                rows.append({"arm": name, "shape": [n_out, n_in], "left_out": "no time was left"})
                continue
            copies = 2 if tiny else max(2, int(BYTES_BETWEEN / n_bytes) + 1)
            try:
                calls = make(copies)
                for n_tokens in tokens:
                    x = torch.randn(n_tokens, n_in, device=device).bfloat16()
                    us = microseconds([lambda call=call, x=x: call(x) for call in calls], device)
                    rows.append(
                        {"arm": name, "n_tokens": n_tokens, "shape": [n_out, n_in], "us": us}
                    )
                del calls
            except Exception as error:  # a rival that does not fit this machine is a result too
                rows.append({"arm": name, "shape": [n_out, n_in], "failed": repr(error)[:300]})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _arms(n_out: int, n_in: int, device: torch.device) -> Arms:
    """Return how each arm makes copies of its weight, and a copy's bytes."""

    def dense(copies: int) -> list[Call]:
        weights = torch.randn(copies, n_out, n_in, device=device, dtype=torch.bfloat16)
        return [lambda x, w=w: F.linear(x, w) for w in weights]

    def rows(copies: int, *, is_quantized_before: bool) -> list[Call]:
        weights = [
            fp8.quantize_rows(torch.randn(n_out, n_in, device=device)) for _ in range(copies)
        ]
        known: list[torch.Tensor] = []  # tokens, and what they are in FP8

        def call(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            if is_quantized_before and (not known or known[0] is not x):
                known[:] = [x, *fp8.quantize_rows(x)]
            q, by = known[1:] if is_quantized_before else _quantize(x)
            return torch._scaled_mm(
                q, w.T, scale_a=by, scale_b=scale.T, out_dtype=torch.bfloat16, use_fast_accum=False
            )

        return [lambda x, w=w, s=s: call(x, w, s) for w, s in weights]

    def ours(copies: int, *, name: str, activations: Any) -> list[Call]:
        made: list[PreparedWeight] = []
        for _ in range(copies):
            made.append(prepare(_packed(name, n_out, n_in, device), activations=activations))
        return list(made)

    n_weights = float(n_out * n_in)
    arms: Arms = {"bf16": (dense, 2 * n_weights)}
    if device.type == "cuda":
        for is_before in (True, False):
            arms["fp8" if is_before else "fp8 and tokens"] = (
                lambda copies, b=is_before: rows(copies, is_quantized_before=b),
                n_weights,
            )
    for name, activations in OURS:
        arms[f"{name} {'w4a8' if activations == 'fp8' else 'w4a16'}"] = (
            lambda copies, n=name, a=activations: ours(copies, name=n, activations=a),
            0.56 * n_weights,
        )
    return arms


def _rivals(n_out: int, n_in: int, device: torch.device) -> Arms:
    """Return the arms of others; they have no CPU kernels."""
    if device.type != "cuda":
        return {}
    return {
        name: (
            lambda copies, make=make: [make(n_out, n_in, device) for _ in range(copies)],
            0.56 * n_out * n_in,
        )
        for name, make in RIVALS.items()
    }


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from trimtab.kernels.matmul import operator

    q, scales = operator.quantize_tokens(x)
    return q, scales.unsqueeze(1)


def _packed(name: str, n_out: int, n_in: int, device: torch.device) -> Packed:
    return format_named(name).quantize(torch.randn(n_out, n_in, device=device))


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how many times as fast as bfloat16 each arm is."""
    plain = {(*r["shape"], r["n_tokens"]): r["us"] for r in rows if r.get("arm") == "bf16"}
    for row in rows:
        if "us" in row and (*row["shape"], row["n_tokens"]) in plain:
            row["times_bf16"] = plain[(*row["shape"], row["n_tokens"])] / row["us"]
    return rows


def microseconds(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """Return what one call takes, one after the other: a graph of all, replayed."""
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        times = []
        for call in calls:
            at = time.perf_counter()
            call()
            times.append(time.perf_counter() - at)
        return 1e6 * statistics.median(times)
    # The first calls compile, tune and allocate, which a capture does not allow.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(calls)

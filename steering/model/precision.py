"""Choose between float32 and bfloat16 on a CPU by measuring, because no CPU flag tells.

A CPU may have bfloat16 instructions and a library that does not use them at these shapes, or lack
them and still gain from reading half the bytes.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional

WIDTH = 2048  # a 16 MB matrix in float32: out of most caches, as weights are when decoding
ROWS = (1, 16)  # one request decoding, and a batch of them
ROUNDS = 8  # the best of eight, because a busy machine slows whichever type is on
# bfloat16 costs precision (three decimal digits), so a tie or a lucky round must not choose it.
MARGIN = 1.2


def cpu_dtype() -> tuple[torch.dtype, str]:
    """Return the faster floating-point type for decoding on this CPU, and the reason in a sentence.

    Times a linear layer, `[1, 2048]` and `[16, 2048]` by `[2048, 2048]`: 30 ms on an idle machine.
    """
    seconds = _measure()
    half, full = (sum(seconds[kind]) for kind in (torch.bfloat16, torch.float32))
    ratio = full / half
    measured = (
        f"a {WIDTH}-wide layer for {ROWS[0]} and {ROWS[1]} tokens took "
        f"{half * 1e3:.1f} ms in bfloat16 and {full * 1e3:.1f} ms in float32 on this CPU"
    )
    if ratio >= MARGIN:
        return torch.bfloat16, f"bfloat16, because {measured}."
    return torch.float32, f"float32, because {measured}, and bfloat16 must win by {MARGIN}x."


def _measure() -> dict[torch.dtype, list[float]]:
    """Return each type's best time in seconds for each count of rows."""
    kinds = (torch.float32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    hidden = torch.randn(max(ROWS), WIDTH, generator=generator)
    weights = {kind: weight.to(kind) for kind in kinds}
    best = {kind: [float("inf")] * len(ROWS) for kind in kinds}
    with torch.inference_mode():
        # The first round also pays for the library's code generation; its times are never best.
        # Types take turns so that a slow moment of the machine hits both.
        for _ in range(ROUNDS + 1):
            for i, n_rows in enumerate(ROWS):
                for kind in kinds:
                    rows = hidden[:n_rows].to(kind)
                    start = time.perf_counter()
                    functional.linear(rows, weights[kind])
                    best[kind][i] = min(best[kind][i], time.perf_counter() - start)
    return best

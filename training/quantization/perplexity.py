"""Negative log-likelihood of rows of tokens: what quantisation costs, in nats a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


@torch.inference_mode()
def nll(
    model: Any, rows: torch.Tensor, *, progress: Callable[[int, int], None] | None = None
) -> float:
    """Return the mean negative log-likelihood of each token given those before it in its row.

    Args:
        model: a causal language model in eval mode.
        rows: `[n_rows, n_tokens]`, int64; the first token of each row is given.
        progress: told of rows done and in all.

    Returns:
        Nats a token; its exponential is the perplexity.
    """
    device = next(model.parameters()).device
    total = 0.0
    for i, row in enumerate(rows.to(device)):
        # The logits of one row in float32 are what this takes in memory.
        logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
        if progress is not None:
            progress(i + 1, len(rows))
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def windows(ids: list[int], *, n_windows: int | None, n_tokens: int) -> torch.Tensor:
    """Cut a text into windows, evenly spread over it if there are more than are wanted.

    Args:
        ids: its tokens, at least one window's.
        n_windows: at most so many; None takes all.
        n_tokens: of a window.
    """
    n_there = len(ids) // n_tokens
    rows = torch.tensor(ids[: n_there * n_tokens]).view(n_there, n_tokens)
    if n_windows is None or n_windows >= n_there:
        return rows
    return rows[[i * n_there // n_windows for i in range(n_windows)]]

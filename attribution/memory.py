"""How much memory a gradient takes, so that one that has no room is refused and not begun."""

from __future__ import annotations

from typing import Any

from trimtab.steering.model.decoder import text_config

# What the estimate adds to the fit.
_MARGIN = 1.1


def gradient_bytes(model: Any, n_tokens: int, *, n_logits: int = 16, n_rows: int = 1) -> int:
    """Return about how many bytes a forward and backward pass takes beside the weights.

    Each layer keeps about 7 hidden and 3.5 inner widths a token, and a number for each pair of
    tokens (the mask); attention with soft-capping keeps its weights, three numbers for each pair
    and head; log-probabilities take 18 bytes a word of the vocabulary and place. Fitted to 32
    peaks on a CPU (benchmarks/attribution_cost.py): widths 512 to 1024, inner 1 to 4 widths, 64 to
    1024 tokens, float32 and bfloat16; 1.01 to 1.4 times each of them, before the margin.

    Args:
        model: a causal language model.
        n_tokens: tokens of a row.
        n_logits: answer tokens of a row.
        n_rows: rows read together.
    """
    config = text_config(model)
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    n_layers = int(config.num_hidden_layers)
    n_heads = int(getattr(config, "num_attention_heads", 1))
    size = next(model.parameters()).element_size()
    is_eager = bool(getattr(config, "attn_logit_softcapping", None))
    per_token = n_layers * (7 * hidden + 3.5 * inner) * size
    per_pair = n_layers * (size + (12 * n_heads if is_eager else 0))
    logits = 18 * n_logits * int(config.vocab_size)
    row = n_tokens * per_token + n_tokens * n_tokens * per_pair + logits
    return int(_MARGIN * n_rows * row)

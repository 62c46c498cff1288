"""How much memory a gradient takes, so that one that has no room is refused and not begun."""

from __future__ import annotations

from typing import Any

from trimtab.steering.model.decoder import text_config


def gradient_bytes(model: Any, n_tokens: int, *, n_rows: int = 1) -> int:
    """Return about how many bytes a forward and backward pass takes beside the weights.

    What every layer keeps for the backward pass, of each token and of each pair of tokens.

    Args:
        model: a causal language model.
        n_tokens: tokens of a row.
        n_rows: rows read together.
    """
    config = text_config(model)
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    n_layers = int(config.num_hidden_layers)
    n_heads = int(getattr(config, "num_attention_heads", 1))
    size = next(model.parameters()).element_size()
    per_token = n_layers * (16 * hidden + 8 * inner) * size
    per_pair = n_layers * n_heads * 4 * 3
    return n_rows * (n_tokens * per_token + n_tokens * n_tokens * per_pair)

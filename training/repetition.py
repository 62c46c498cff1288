"""How much of a text is said again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def repetition(tokens: Sequence[Hashable], *, n: int = 3) -> float:
    """Return the share of a text's n-grams that occurred before in it, 0 to 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return 0.0
    return 1.0 - len(Counter(grams)) / len(grams)

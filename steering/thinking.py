"""Which tokens of a growing sequence lie in a thinking span."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ThinkingMarks:
    """Token ids that open and close a thinking span."""

    open: int
    close: int

    @classmethod
    def of(cls, tokenizer: Any) -> ThinkingMarks | None:
        """Return a tokenizer's marks, None if it has none."""
        vocab = tokenizer.get_vocab()
        if "<think>" in vocab and "</think>" in vocab:
            return cls(vocab["<think>"], vocab["</think>"])
        return None


class ThinkingSpans:
    """Follows a sequence and remembers which generated tokens are thinking.

    Prompt tokens never count, but a span that the prompt opens goes on in the answer. The mark
    that opens a span is in it, and so is the one that closes it.

    Args:
        marks: the model's.
        prompt_ids: the prompt.
    """

    def __init__(self, marks: ThinkingMarks, prompt_ids: Iterable[int]) -> None:
        self._marks = marks
        self._is_open = False
        self._n_prompt = 0
        self._generated: list[bool] = []
        for token in prompt_ids:
            self._n_prompt += 1
            self._turn(token)

    @property
    def n_tokens(self) -> int:
        """Tokens seen, the prompt's too."""
        return self._n_prompt + len(self._generated)

    def push(self, token_id: int) -> None:
        """Add a generated token."""
        self._generated.append(self._is_open or token_id == self._marks.open)
        self._turn(token_id)

    def flags(self, start: int, n: int) -> np.ndarray | None:
        """Return whether the tokens from position `start` are thinking, `[n]`, bool.

        None if all of them are the prompt's.
        """
        if start + n <= self._n_prompt:
            return None
        flags = np.zeros(n, dtype=bool)
        first = max(start, self._n_prompt)
        known = self._generated[first - self._n_prompt : start + n - self._n_prompt]
        flags[first - start : first - start + len(known)] = known
        return flags

    def _turn(self, token_id: int) -> None:
        if token_id == self._marks.open:
            self._is_open = True
        elif token_id == self._marks.close:
            self._is_open = False

"""Which tokens of a request a part of its plan touches, by phase and position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.steering.spec import Apply


@dataclass(frozen=True)
class Window:
    """A part's tokens: prompt, answer, thinking span, first n and after n generated tokens.

    Positions are absolute in the sequence, so the choice is the same for chunked prefill, for
    decoding and for a recomputed prefix. A generated token counts from 0.
    """

    prompt: bool = True
    generation: bool = True
    thinking: bool = True
    first: int | None = None
    after: int | None = None

    @classmethod
    def of(cls, apply: Apply) -> Window:
        """Return the window a spec's `apply` asks for."""
        thinking = apply.generation if apply.thinking is None else apply.thinking
        return cls(apply.prompt, apply.generation, thinking, apply.first, apply.after)

    @property
    def everywhere(self) -> bool:
        """True if every token of the request is inside."""
        return (
            self.prompt
            and self.generation
            and self.thinking
            and self.first is None
            and not self.after
        )

    @property
    def same_in_answer(self) -> bool:
        """True if either every generated token is inside, or none."""
        return self.generation == self.thinking and self.first is None and not self.after

    @property
    def empty(self) -> bool:
        """True if no token of any request can be inside."""
        generated = self.generation or self.thinking
        if generated and self.first is not None:
            generated = self.first > (self.after or 0)
        return not (self.prompt or generated)

    def select(
        self, positions: np.ndarray, *, n_prompt: int, thinking: np.ndarray | None = None
    ) -> np.ndarray:
        """Return which positions are inside.

        Args:
            positions: absolute positions of the tokens, `[n]`, int64.
            n_prompt: length of the prompt in tokens.
            thinking: whether each token lies in a thinking span, `[n]`, bool; None means no.

        Returns:
            `[n]`, bool.
        """
        if self.everywhere:
            return np.ones(len(positions), dtype=bool)
        generated = positions - n_prompt
        inside = np.full(len(positions), self.generation)
        if thinking is not None:
            inside = np.where(thinking, self.thinking, inside)
        if self.first is not None:
            inside = inside & (generated < self.first)
        if self.after is not None:
            inside = inside & (generated >= self.after)
        return np.where(generated < 0, self.prompt, inside)

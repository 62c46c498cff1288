"""Steps made once and used again while the batch stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.steering.bank import Bank
from trimtab.steering.step import Span, SteerStep


class StepPlanner:
    """Makes the step of each forward pass, or hands out the last one where nothing has changed.

    In decoding most passes have the same requests as the one before, one token each, and what
    happens to a token does not depend on its position. Then neither slots nor rows nor goals need
    be gathered anew.

    Args:
        bank: holds the live plans.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._key: tuple[Any, ...] | None = None
        self._step: SteerStep | None = None

    def step(self, spans: Sequence[Span]) -> SteerStep:
        """Return the step of a pass.

        Raises:
            SplitPromptError: a gate needs the whole prompt and gets a part.
        """
        if not all(span.is_steady for span in spans):
            self._key = self._step = None
            return SteerStep(self.bank, spans)
        # A lease is itself only: a slot that was given back and taken again is another's.
        key = tuple((span.n_tokens, span.request and span.request.lease) for span in spans)
        if self._step is None or key != self._key:
            self._step = SteerStep(self.bank, spans)
            self._key = key
        return self._step

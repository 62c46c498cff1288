"""The receipt of a steered answer: what was applied, where, how strongly, and what came of it."""

from __future__ import annotations

from typing import Any

from trimtab.serving.engines.base import Delta
from trimtab.steering.plan import Plan


class Receipt:
    """Collects a steered answer's receipt while its choices finish.

    Args:
        plan: the request's compiled steering.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._choices: dict[int, dict[str, Any]] = {}

    def note(self, index: int, delta: Delta) -> None:
        """Take in a delta of choice `index`; only the last of a choice counts."""
        if delta.finish_reason is not None:
            # None comes from a plan whose every scale is 0: it has no part to steer with.
            runtime = delta.steering or {"steered_tokens": 0, "gates": []}
            self._choices[index] = {"index": index, **runtime}

    def short(self) -> dict[str, Any]:
        """Return which steering it was, without doses and what came of it, plain JSON."""
        return {key: self._plan.receipt[key] for key in ("fingerprint", "applied")}

    def body(self) -> dict[str, Any]:
        """Return the receipt, plain JSON."""
        return {
            **self._plan.receipt,
            "choices": [self._choices[index] for index in sorted(self._choices)],
        }

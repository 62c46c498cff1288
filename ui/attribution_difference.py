"""What steering did to an attribution: two of the same answer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trimtab.steering.errors import DataError
from trimtab.ui.attribution_pieces import Piece
from trimtab.ui.attribution_report import Report
from trimtab.ui.attribution_scores import Scores

_DECIMALS = 6  # the wire's


@dataclass(frozen=True)
class Difference(Scores):
    """The scores under steering minus the scores without it.

    Attributes:
        steered: the attribution under steering.
        unsteered: the same question's without it.

    Raises:
        DataError: they are not of the same prompt, or not in the same unit.
    """

    steered: Report
    unsteered: Report
    scale: float | None = None

    def __post_init__(self) -> None:
        one, other = (
            [(token["token_id"], token["kind"]) for token in report.tokens]
            for report in (self.steered, self.unsteered)
        )
        if one != other or self.steered.unit != self.unsteered.unit:
            raise DataError(
                "These two attributions cannot be compared: they are of different prompts, or in "
                "different units."
            )

    @cached_property
    def tokens(self) -> Sequence[dict[str, Any]]:
        """The prompt's tokens, with the difference as their score."""
        pairs = zip(self.steered.tokens, self.unsteered.tokens, strict=True)
        return [
            {
                **token,
                "score": None
                if token["score"] is None
                else round(token["score"] - other["score"], _DECIMALS),
            }
            for token, other in pairs
        ]

    @property
    def unit(self) -> str:
        """What the scores are in."""
        return self.steered.unit

    def account(self, piece: Piece) -> str:
        """Return the difference at a piece that has one, and what it is the difference of."""
        one, other = (
            sum(report.tokens[i]["score"] or 0.0 for i in piece.indexes)
            for report in (self.steered, self.unsteered)
        )
        return f"{piece.score:+.6f}, from {other:+.6f} unsteered to {one:+.6f} steered"

    @property
    def summary(self) -> str:
        """What the steering did to F and to the sum of the scores."""
        values, sums = (
            [float(report.result[part][name]) for report in (self.steered, self.unsteered)]
            for part, name in (("objective", "value"), ("summary", "sum"))
        )
        return (
            f"The steering takes F from {values[1]:+.3f} to {values[0]:+.3f} nats, and the sum of "
            f"the scores from {sums[1]:+.3f} to {sums[0]:+.3f} ({sums[0] - sums[1]:+.3f})."
        )

    def on_one_scale(self) -> Difference:
        """Return the same with one colour scale for all three, the widest of their own."""
        end = max(self.end, self.steered.end, self.unsteered.end)
        return Difference(
            replace(self.steered, scale=end), replace(self.unsteered, scale=end), scale=end
        )

"""What an attribution explains: one answer's log-probability, or one answer's over another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.attribution.errors import AttributionError


@dataclass(frozen=True)
class Objective:
    """F(x) = log P(preferred | x), minus log P(dispreferred | x) if there is one, in nats.

    Source: GrAInS, arXiv 2507.18043, the contrastive objective.

    Differs: log P is summed over all tokens of an answer; the published code takes the answer's
    last token alone, at the logits that predict the token after it.

    Attributes:
        preferred: tokens of the answer to explain, at least one.
        dispreferred: tokens of the answer it is compared with; None explains one answer.
        is_normalized: divide each answer's log-probability by its number of tokens.
    """

    preferred: tuple[int, ...]
    dispreferred: tuple[int, ...] | None = None
    is_normalized: bool = False

    def __post_init__(self) -> None:
        for name, answer in zip(("preferred", "dispreferred"), self.answers, strict=False):
            if not answer:
                raise AttributionError(f"The {name} answer has no token.", param=name)
        if self.preferred == self.dispreferred:
            raise AttributionError(
                "The preferred and the dispreferred answer are the same tokens; there is no "
                "difference to explain.",
                param="dispreferred",
            )

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """The answers, preferred first."""
        if self.dispreferred is None:
            return (self.preferred,)
        return self.preferred, self.dispreferred

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each token's log-probability in F, the preferred answer's tokens first."""
        weights: list[float] = []
        for sign, answer in zip((1.0, -1.0), self.answers, strict=False):
            each = sign / len(answer) if self.is_normalized else sign
            weights.extend([each] * len(answer))
        return tuple(weights)

    @property
    def kind(self) -> str:
        """Its name on the wire."""
        return "logprob" if self.dispreferred is None else "logprob_contrast"


def without_end_marks(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """Return a generated answer's tokens without the special ones it ends with; maybe none."""
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    return tuple(ids[:end])

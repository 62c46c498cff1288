"""Scores of a prompt's tokens on a colour scale: an attribution's own, or a difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from trimtab.ui.attribution_pieces import Piece, pieces_of


class Scores:
    """What a heat map is drawn of. Its `tokens` and `unit` are each subclass's own.

    Attributes:
        scale: the colour scale's end, where several maps share one; None takes these scores' own.
    """

    scale: float | None

    @property
    def tokens(self) -> Sequence[dict[str, Any]]:
        """The prompt's tokens, as `input` of the wire form has them."""
        raise NotImplementedError

    @property
    def unit(self) -> str:
        """What the scores are in."""
        raise NotImplementedError

    @cached_property
    def pieces(self) -> list[Piece]:
        """The prompt, first to last."""
        return pieces_of(self.tokens)

    @cached_property
    def scored(self) -> list[Piece]:
        """The pieces that have a score, the strongest first."""
        scored = [piece for piece in self.pieces if piece.score is not None]
        return sorted(scored, key=lambda piece: -abs(piece.score or 0.0))

    @cached_property
    def end(self) -> float:
        """The colour scale's end: the 99th percentile of the scores' sizes, at least 1e-9."""
        if self.scale is not None:
            return self.scale
        sizes = sorted(abs(piece.score or 0.0) for piece in self.scored)
        if not sizes:
            return 1e-9
        at = 0.99 * (len(sizes) - 1)
        low = int(at)
        high = min(low + 1, len(sizes) - 1)
        return max(sizes[low] + (at - low) * (sizes[high] - sizes[low]), 1e-9)

    def share(self, piece: Piece) -> float:
        """Return a piece's score as a share of the scale, -1 to 1; 0 for one without a score."""
        return max(-1.0, min(1.0, (piece.score or 0.0) / self.end))

    def account(self, piece: Piece) -> str:
        """Return the score of a piece that has one, in figures."""
        return f"{piece.score:+.6f}"

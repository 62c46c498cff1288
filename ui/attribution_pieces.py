"""The tokens of an attributed prompt, put together to pieces that can be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """Tokens shown as one: a single one, or those that a character was cut into.

    Attributes:
        indexes: their numbers in the prompt.
        ids: their ids.
        text: the piece of the prompt they stand for.
        kind: `text`, `template` or `special`.
        role: role of the message they belong to, or None.
        score: sum of their scores, nats; None for template and special tokens.
    """

    indexes: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    kind: str
    role: str | None
    score: float | None

    @property
    def where(self) -> str:
        """Its numbers: `7`, or `7-9`."""
        first, last = self.indexes[0], self.indexes[-1]
        return str(first) if first == last else f"{first}-{last}"


def pieces_of(tokens: Sequence[dict[str, Any]]) -> list[Piece]:
    """Return the pieces of a prompt, first to last.

    Bytes of a character that several tokens share go with the token that carries it, their
    scores summed; every score is in exactly one piece.

    Args:
        tokens: `input` of the wire form.
    """
    pieces: list[Piece] = []
    waiting: list[dict[str, Any]] = []
    for n, token in enumerate(tokens):
        waiting.append(token)
        following = tokens[n + 1] if n + 1 < len(tokens) else None
        # Bytes of a character wait for the token that carries it.
        is_whole = token["token"] or following is None or following["kind"] != token["kind"]
        if is_whole:
            pieces.append(_joined(waiting))
            waiting = []
    return pieces


def _joined(tokens: list[dict[str, Any]]) -> Piece:
    scores = [token["score"] for token in tokens if token["score"] is not None]
    return Piece(
        indexes=tuple(token["index"] for token in tokens),
        ids=tuple(token["token_id"] for token in tokens),
        text="".join(token["token"] for token in tokens),
        kind=tokens[-1]["kind"],
        role=tokens[-1]["role"],
        score=sum(scores) if scores else None,
    )

"""What was said to the model and what came of it, on the unsteered side and the steered one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from trimtab.ui.page.run_settings import RunSettings

SIDES = ("baseline", "steered")


@dataclass(frozen=True)
class Piece:
    """What one event of the stream added.

    Attributes:
        text: complete characters.
        tokens: the text of each of its tokens, decoded alone.
        logprob: their summed log-probability under the model that chose them, nats.
        readings: of each probe its labels' probabilities at the last of them.
    """

    text: str
    tokens: tuple[str, ...] = ()
    logprob: float = 0.0
    readings: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Answer:
    """One side's answer, growing while it streams.

    Attributes:
        pieces: in order.
        surprise: (characters, nats) of each token as the unsteered model reads the text, as far as
            it was read; characters are where the token ends in the text.
        receipt: what was applied, once the answer is complete.
        finish: why it ended: OpenAI's words, `stopped` by the visitor, `failed`; None before.
        error: the sentence of a failure.
    """

    pieces: list[Piece] = field(default_factory=list)
    surprise: list[tuple[int, float]] = field(default_factory=list)
    unread: str | None = None
    receipt: dict[str, Any] | None = None
    finish: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[str]:
        """The text of every token."""
        return [token for piece in self.pieces for token in piece.tokens]


@dataclass
class Turn:
    """A prompt and its two answers.

    Attributes:
        settings: what was asked; its prompt is the turn's.
        dose: relative dose at each steered layer, from the server's check.
    """

    settings: RunSettings
    baseline: Answer = field(default_factory=Answer)
    steered: Answer = field(default_factory=Answer)
    dose: dict[str, float] = field(default_factory=dict)

    def side(self, name: str) -> Answer:
        """Return the answer of `baseline` or `steered`."""
        return self.baseline if name == "baseline" else self.steered


@dataclass
class Conversation:
    """One visitor's turns, and the run that is under way.

    Attributes:
        turns: in order.
        tasks: of the run.
        answering: what they fill.
        is_over: its visitor has left; no run may begin.
        asking: held from a press until its run has started, so that presses take effect in order.
        n_presses: how many asked for answers so far.
    """

    turns: list[Turn] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    answering: list[Answer] = field(default_factory=list)
    is_over: bool = False
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    n_presses: int = 0

    @property
    def last(self) -> Turn | None:
        """The newest turn."""
        return self.turns[-1] if self.turns else None

    @property
    def is_running(self) -> bool:
        """True while an answer streams."""
        return any(not task.done() for task in self.tasks)

    def stop(self) -> None:
        """End what runs; its answers stay as far as they came."""
        for task in self.tasks:
            task.cancel()
        # Here and not in the tasks: one that is cancelled before its first step does nothing.
        for answer in self.answering:
            answer.finish = answer.finish or "stopped"
        self.tasks, self.answering = [], []

    def drop_unanswered(self) -> None:
        """Forget the last turn if it was stopped before a word of it came."""
        if self.last is not None and all(
            answer.finish == "stopped" and not answer.text for answer in map(self.last.side, SIDES)
        ):
            self.turns.pop()

    def messages(self, side: str, *, until: Turn) -> list[dict[str, str]]:
        """Return the API's messages of one side, up to and with the prompt of a turn.

        Each side goes on from its own answers; one that failed or is empty is left out with its
        prompt, for a model cannot go on from it.
        """
        messages: list[dict[str, str]] = []
        for turn in self.turns:
            if turn is until:
                break
            answer = turn.side(side).text
            if answer:
                messages += [_said("user", turn.settings.prompt), _said("assistant", answer)]
        return [*messages, _said("user", until.settings.prompt)]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

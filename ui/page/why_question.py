"""What the Why tab asks: which answer, in which conversation, steered or not, by which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.conversation import Conversation, Turn

STEERED = "The last steered answer"
UNSTEERED = "The last unsteered answer"
AGAINST = "The steered against the unsteered answer"
TYPED = "Preferred against dispreferred"
WHATS = (STEERED, UNSTEERED, AGAINST, TYPED)
_SIDES = {"steered": "steered answer", "baseline": "unsteered answer"}


class QuestionError(TrimtabError):
    """A question that cannot be asked yet, with what has to be done first."""

    code = "invalid_question"


@dataclass(frozen=True)
class How:
    """How to attribute.

    Attributes:
        method: a name; empty takes the server's default.
        options: the method's, as text.
        is_measured: have the server check the scores' faithfulness too.
    """

    method: str = ""
    options: Mapping[str, str] | None = None
    is_measured: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the API's fields."""
        fields: dict[str, Any] = {"faithfulness": True} if self.is_measured else {}
        if self.method:
            fields["method"] = self.method
        return {**fields, "params": dict(self.options)} if self.options else fields


@dataclass(frozen=True)
class Question:
    """One answer, or two to be told apart.

    Attributes:
        messages: the conversation before them.
        answers: text by its name on the wire: `target`, or `preferred` and `dispreferred`.
        names: what each is called.
        turn: whose steering it is asked under; None for none.
        sides: whether it is asked under the steering, for each time it is asked.
    """

    messages: Sequence[dict[str, str]]
    answers: Mapping[str, str]
    names: Mapping[str, str]
    turn: Turn | None
    sides: tuple[bool, ...]

    def body(self, *, is_steered: bool, model: str, how: How) -> dict[str, Any]:
        """Return the body of POST /v1/attributions.

        Args:
            is_steered: ask the steered model.
            model: the served model's name.
            how: the method.
        """
        fields = {"model": model, "messages": list(self.messages), **self.answers, **how.fields()}
        if is_steered and self.turn is not None:
            fields["model"] = self.turn.settings.model_name(model)
            if self.turn.settings.steering is not None:
                fields["steering"] = self.turn.settings.steering
        return {**fields, "stream": True}


def question_of(
    what: str,
    chat: Conversation,
    *,
    prompt: str = "",
    preferred: str = "",
    dispreferred: str = "",
    is_compared: bool = False,
) -> Question:
    """Return the question.

    Args:
        what: one of `WHATS`.
        chat: the visitor's; its last turn has the answers and the steering.
        prompt, preferred, dispreferred: for `TYPED`; without the last it is about one answer.
        is_compared: ask it under the last turn's steering and without it.

    Raises:
        QuestionError: there is no such answer, or nothing steered it.
    """
    if what not in WHATS:
        raise QuestionError(f"Choose what to explain: {'; '.join(WHATS)}.")
    turn = chat.turns[-1] if chat.turns else None
    if what == TYPED:
        messages, answers, names = _typed(prompt, preferred, dispreferred)
        is_steered = False
    elif turn is None:
        raise QuestionError("There is no answer yet. Ask something in Chat first.")
    else:
        side = "baseline" if what == UNSTEERED else "steered"
        is_steered = side == "steered" and turn.settings.is_steered
        messages = chat.messages(side, until=turn)
        answers, names = _answers(turn, side, is_contrast=what == AGAINST)
    if is_compared and (turn is None or not turn.settings.is_steered):
        raise QuestionError(
            "Nothing steers the last answer in Chat, so there is no difference to show. Choose a "
            "vector there and ask again, or untick the difference."
        )
    sides = (True, False) if is_compared else (is_steered,)
    return Question(messages, answers, names, turn if any(sides) else None, sides)


def read_options(text: str) -> dict[str, str]:
    """Return a method's options from `samples=256, seed=1`.

    Raises:
        QuestionError: a part is no `name=value`, or a name is there twice.
    """
    options: dict[str, str] = {}
    for part in text.replace(",", " ").split():
        name, equals, value = part.partition("=")
        if not (name and equals and value) or name in options:
            raise QuestionError(
                f"{part[:80]!r} among the method's options is not a new name=value. Write them "
                "such as samples=256, seed=1."
            )
        options[name] = value
    return options


def _typed(
    prompt: str, preferred: str, dispreferred: str
) -> tuple[list[dict[str, str]], dict[str, str], dict[str, str]]:
    if not prompt.strip() or not preferred.strip():
        raise QuestionError(
            "Type a prompt and the answer to explain, and for a sharper picture the answer that it "
            "is compared with."
        )
    messages = [{"role": "user", "content": prompt}]
    if not dispreferred.strip():
        return messages, {"target": preferred}, {"target": "Answer"}
    _check_differ(preferred, dispreferred, "Write two that differ.")
    return (
        messages,
        {"preferred": preferred, "dispreferred": dispreferred},
        {"preferred": "Preferred answer", "dispreferred": "Dispreferred answer"},
    )


def _answers(turn: Turn, side: str, *, is_contrast: bool) -> tuple[dict[str, str], dict[str, str]]:
    own = _text(turn, side)
    if not is_contrast:
        return {"target": own}, {"target": _SIDES[side].capitalize()}
    other = _text(turn, "baseline")
    _check_differ(own, other, "Steer more strongly in Chat, or explain one of them alone.")
    return (
        {"preferred": own, "dispreferred": other},
        {"preferred": "Steered answer", "dispreferred": "Unsteered answer"},
    )


def _text(turn: Turn, side: str) -> str:
    answer = turn.side(side)
    if answer.finish is None:
        raise QuestionError(
            f"The {_SIDES[side]} is not complete yet. Wait until it is, or stop it in Chat."
        )
    if not answer.text.strip():
        raise QuestionError(f"The {_SIDES[side]} has no words to explain. Ask again in Chat.")
    return answer.text


def _check_differ(one: str, other: str, remedy: str) -> None:
    if one == other:
        raise QuestionError(
            f"The two answers are the same, so no word speaks for one over the other. {remedy}"
        )

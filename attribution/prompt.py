"""A prompt as tokens that know where in the text they stand and whether a person wrote them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jinja2 import TemplateError

from trimtab.attribution.errors import AttributionError


class TokenKind(StrEnum):
    """What put a token there."""

    TEXT = "text"
    """Somebody's words: the only tokens that take part in an attribution."""
    TEMPLATE = "template"
    """The chat template's own words and line ends, a system prompt it adds included."""
    SPECIAL = "special"
    """A token that is no text, such as an end mark."""


@dataclass(frozen=True)
class PromptToken:
    """One token of a prompt.

    Attributes:
        id: its id.
        text: the piece of the prompt it stands for. The pieces of all tokens, one after the
            other, are the prompt; a character cut into several tokens belongs to the last of
            them, the others have an empty piece.
        start: where the piece begins in the prompt, in characters.
        stop: where it ends.
        kind: who wrote it.
        role: role of the message it belongs to; None in a plain prompt and between messages.
        message: the message's number; None likewise.
    """

    id: int
    text: str
    start: int
    stop: int
    kind: TokenKind
    role: str | None = None
    message: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be attributed.

    Attributes:
        text: the whole text as the model reads it, template included.
        tokens: its tokens, first to last.
    """

    text: str
    tokens: tuple[PromptToken, ...]

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        return [token.id for token in self.tokens]

    @property
    def content(self) -> list[int]:
        """Numbers of the tokens that are somebody's words."""
        return [i for i, token in enumerate(self.tokens) if token.kind is TokenKind.TEXT]


@dataclass(frozen=True)
class _Stretch:
    start: int
    stop: int
    role: str | None
    message: int | None


def prompt_from_text(tokenizer: Any, text: str) -> Prompt:
    """Return a plain prompt; tokens the tokenizer adds (such as BOS) are special.

    Raises:
        AttributionError: no text, or a tokenizer that cannot tell where its tokens stand.
    """
    if not text:
        raise AttributionError(
            "The prompt is empty; there is nothing to attribute.", param="prompt"
        )
    whole = _Stretch(0, len(text), None, None)
    return _prompt(tokenizer, text, [whole], has_added=True, param="prompt")


def prompt_from_messages(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Prompt:
    """Return a conversation in the model's chat template, open for the assistant's answer.

    A last message of the assistant's is left open, so that the answer goes on where it ends.

    Args:
        tokenizer: the model's, with a chat template.
        messages: `{"role", "content"}` each.

    Raises:
        AttributionError: no template, it refuses the messages, or hides them beyond recognition.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise AttributionError(
            "This model has no chat template; give a plain prompt.", param="messages"
        )
    if not messages:
        raise AttributionError("There are no messages to attribute.", param="messages")
    text = _rendered(tokenizer, messages)
    stretches = _by_marks(tokenizer, messages, text) or _by_search(messages, text)
    if stretches is None:
        raise AttributionError(
            "The model's chat template changes the messages so that their words cannot be found "
            "again in what the model reads; give a plain prompt.",
            param="messages",
        )
    return _prompt(tokenizer, text, stretches, has_added=False, param="messages")


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    goes_on = messages[-1]["role"] == "assistant"
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=False,
        )
    # Templates are programs: beside Jinja's own errors they end in Python's usual ones.
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise AttributionError(
            f"The model's chat template refuses these messages: {str(error)[:300]}.",
            param="messages",
        ) from error
    return text


def _by_marks(
    tokenizer: Any, messages: Sequence[dict[str, str]], text: str
) -> list[_Stretch] | None:
    """Find the messages by rendering marks in their place; None if the template treats them so
    differently that the text does not come out the same."""
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    try:
        marked = _rendered(
            tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        )
    except AttributionError:
        return None
    pieces = re.split("(\ue000[0-9]+\ue001)", marked)
    at = 0
    stretches: list[_Stretch] = []
    for n, piece in enumerate(pieces):
        if n % 2 == 0:
            if not text.startswith(piece, at):
                return None
            at += len(piece)
            continue
        i = int(piece[1:-1])
        own = messages[i]["content"]
        following = pieces[n + 1]
        for form in (own, own.strip(), own.rstrip(), own.lstrip()):
            end = at + len(form)
            if text.startswith(form, at) and text.startswith(following, end):
                stretches.append(_Stretch(at, end, messages[i]["role"], i))
                at = end
                break
        else:
            return None
    return stretches if at == len(text) and len(stretches) == len(messages) else None


def _by_search(messages: Sequence[dict[str, str]], text: str) -> list[_Stretch] | None:
    at = 0
    stretches = []
    for i, message in enumerate(messages):
        own = message["content"].strip()
        start = text.find(own, at)
        if start < 0:
            return None
        at = start + len(own)
        stretches.append(_Stretch(start, at, message["role"], i))
    return stretches


def _prompt(
    tokenizer: Any, text: str, stretches: list[_Stretch], *, has_added: bool, param: str
) -> Prompt:
    if not getattr(tokenizer, "is_fast", False):
        raise AttributionError(
            f"{type(tokenizer).__name__} cannot tell where in a text its tokens stand, which "
            "attribution needs."
        )
    encoded = tokenizer(text, add_special_tokens=has_added, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if not ids:
        raise AttributionError("The prompt makes no token.", param=param)
    special = set(tokenizer.all_special_ids) | {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    tokens = []
    offsets = encoded["offset_mapping"]
    for id, (start, stop), (_, last) in zip(ids, _tiled(text, offsets), offsets, strict=True):
        kind, role, message = TokenKind.TEMPLATE, None, None
        # A token belongs to the message its last character is in: a leading space may be the
        # template's.
        found = next((s for s in stretches if s.start < last <= s.stop), None)
        if id in special:
            kind = TokenKind.SPECIAL
        elif found is not None:
            kind, role, message = TokenKind.TEXT, found.role, found.message
        tokens.append(PromptToken(id, text[start:stop], start, stop, kind, role, message))
    return Prompt(text, tuple(tokens))


def _tiled(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans that tile the text in token order.

    Tokenizers leave leading spaces out of a span, and give every token of a character cut into
    several the whole character.
    """
    stops = [stop for _, stop in offsets]
    spans = []
    at = 0
    for n, (start, stop) in enumerate(offsets):
        following = offsets[n + 1] if n + 1 < len(offsets) else None
        shares_end = following is not None and following[0] < stop <= following[1]
        # The piece ends before the character it shares with the next token.
        end = min(stop, following[0]) if shares_end and following is not None else stop
        end = max(end, at) if stop > start else at
        spans.append((at, end))
        at = end
    if spans and stops and at < len(text):
        spans[-1] = (spans[-1][0], len(text))
    return spans

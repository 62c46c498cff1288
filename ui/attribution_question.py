"""What `trimtab attribute` is asked, checked as far as that goes without a model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from trimtab.ui.prompt_source import check_words, read_prompt

MAX_TOKENS = 64
_MOST_WORDS = 300
_ASKED = ((), ("target",), ("dispreferred",), ("preferred", "dispreferred"))


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to explain.

    Attributes:
        prompt: a text, or messages.
        is_raw: the text is read as it stands, without the chat template.
        answers: text by name: `target`, or `preferred` and `dispreferred`. Without the first of
            these the model gives it itself.
        max_tokens: longest answer of the model's own.
        is_normalized: divide each answer's log-probability by its number of tokens.
        words: the command line's part that asks this, to be repeated; None where stdin said
            it, or it is no line to copy.
    """

    prompt: str | list[dict[str, str]]
    is_raw: bool
    answers: Mapping[str, str]
    max_tokens: int
    is_normalized: bool
    words: str | None

    @property
    def is_own(self) -> bool:
        """Whether the answer to explain is the model's own."""
        return not {"target", "preferred"} & set(self.answers)


def question_of(
    prompt: str | None,
    messages: Path | None,
    *,
    answers: Mapping[str, str | None],
    max_tokens: int | None,
    is_raw: bool,
    is_normalized: bool,
) -> Question:
    """Return what is asked.

    Args:
        prompt: words, or `-` for stdin.
        messages: a JSON file of messages, or `-`.
        answers: `target`, `preferred` and `dispreferred` in this order, None where not given.
        max_tokens: longest answer of the model's own; None takes `MAX_TOKENS`.
        is_raw, is_normalized: see `Question`.

    Raises:
        click.UsageError: options that contradict each other, or an answer without words.
        DataError: a prompt that cannot be read.
    """
    given = {name: text for name, text in answers.items() if text is not None}
    if tuple(given) not in _ASKED:
        raise click.UsageError(
            "Give --target, or --preferred with --dispreferred, or --dispreferred alone to compare "
            "it with the model's own answer, or none of them to explain that."
        )
    if {"target", "preferred"} & set(given) and max_tokens is not None:
        raise click.UsageError("--max-tokens is for the model's own answer; an answer is given.")
    if is_raw and messages is not None:
        raise click.UsageError("--raw reads PROMPT without the chat template; --messages needs it.")
    for name, text in given.items():
        check_words(text, name=f"--{name}")
    return Question(
        prompt=read_prompt(prompt, messages),
        is_raw=is_raw,
        answers=given,
        max_tokens=max_tokens or MAX_TOKENS,
        is_normalized=is_normalized,
        words=_words(
            prompt, messages, given, max_tokens, is_raw=is_raw, is_normalized=is_normalized
        ),
    )


def _words(
    prompt: str | None,
    messages: Path | None,
    answers: Mapping[str, str],
    max_tokens: int | None,
    *,
    is_raw: bool,
    is_normalized: bool,
) -> str | None:
    # What begins with a dash is stdin, or would be read as an option.
    if (prompt or str(messages)).startswith("-"):
        return None
    words = ["--messages", str(messages)] if prompt is None else [prompt]
    for name, text in answers.items():
        words += [f"--{name}", text]
    words += [] if max_tokens is None else ["--max-tokens", str(max_tokens)]
    words += ["--raw"] * is_raw + ["--normalize-length"] * is_normalized
    said = shlex.join(words)
    # To be copied, it has to be one line with nothing in it that a terminal would obey.
    return said if said.isprintable() and len(said) <= _MOST_WORDS else None

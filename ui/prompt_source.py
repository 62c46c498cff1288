"""The prompt of a command: words on the command line, a pipe, or a file of messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click

from trimtab.steering.errors import DataError

MAX_BYTES = 16 * 2**20
SHAPE = '[{"role": "user", "content": "Hello"}]'


def read_prompt(text: str | None, messages: Path | None) -> str | list[dict[str, str]]:
    """Return the text, or the messages, that a command is about.

    Args:
        text: the words; `-` reads them from stdin.
        messages: a JSON file of messages; `-` reads it from stdin.

    Raises:
        click.UsageError: neither or both, or no words.
        DataError: what is read is no text, or no list of messages.
    """
    if (text is None) == (messages is None):
        raise click.UsageError("Give one of PROMPT and --messages; - reads it from stdin.")
    if messages is not None:
        name = "stdin" if str(messages) == "-" else str(messages)
        return _messages(_file(messages, name=name), name=name)
    assert text is not None  # one of the two
    name = "PROMPT"
    if text == "-":
        # The line end is the pipe's, not the prompt's.
        text, name = _read(sys.stdin.buffer, name="stdin").removesuffix("\n"), "stdin"
    check_words(text, name=name)
    return text


def check_words(text: str, *, name: str) -> None:
    """Refuse a text without words, or with half a character in it.

    Raises:
        click.UsageError: it is empty.
        DataError: it cannot be written as UTF-8.
    """
    if not text.strip():
        raise click.UsageError(f"{name} is empty; give some words.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} is not valid text; give it as UTF-8.") from None


def _file(path: Path, *, name: str) -> str:
    if str(path) == "-":
        return _read(sys.stdin.buffer, name=name)
    if not path.is_file():
        raise DataError(f"There is no file {name!r}. It should hold messages: {SHAPE}.")
    with path.open("rb") as opened:
        return _read(opened, name=name)


def _read(stream: BinaryIO, *, name: str) -> str:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} is over {MAX_BYTES // 2**20} MiB; no model reads that much.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not valid text; give it as UTF-8.") from None


def _messages(text: str, *, name: str) -> list[dict[str, str]]:
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"{name} is no JSON: {error}. It should hold messages: {SHAPE}.") from None
    if not isinstance(found, list) or not found:
        raise DataError(f"{name} holds no list of messages. It should hold: {SHAPE}.")
    for i, message in enumerate(found):
        is_message = isinstance(message, dict) and set(message) == {"role", "content"}
        if not is_message or not all(isinstance(value, str) for value in message.values()):
            raise DataError(
                f"{name}[{i}] is no message. It takes the two texts `role` and `content`: {SHAPE}."
            )
        if message["content"]:
            check_words(message["content"] + ".", name=f"{name}[{i}].content")
    return found

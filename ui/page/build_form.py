"""What the forms of vectors and of classifiers share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.library import checked_name
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import done, problem
from trimtab.ui.page.pasted import MAX_CHARS
from trimtab.ui.page.upload import Upload
from trimtab.ui.page.uploaded_text import uploaded_text

MAX_NAME = 64
MAX_WORDS = 1000


class FormError(TrimtabError):
    """A form that is not filled in."""

    code = "incomplete_form"


class PastedExamples:
    """A field for examples, and one for a file whose text goes into it.

    Args:
        label: what the examples are.
        hint: how a line looks.
        elem_id: of the field; the file's has `-file` after it.
        notice: where what happened is said.
    """

    def __init__(self, label: str, *, hint: str, elem_id: str, notice: gr.HTML) -> None:
        self.text = gr.Textbox(
            "",
            label=label,
            info=hint,
            lines=8,
            max_lines=16,
            max_length=MAX_CHARS,
            elem_id=elem_id,
        )
        self.file = Upload(
            "or a file of such lines (.jsonl, .tsv, .txt)",
            elem_id=f"{elem_id}-file",
            suffixes=(".jsonl", ".json", ".tsv", ".txt"),
            most=MAX_CHARS,
        )
        self.file.place.change(
            _read,
            self.file.place,
            [notice, self.text, self.file.place],
            **LIVE,
        )


def name_field(kind: str) -> gr.Textbox:
    """Return the field for the name of a vector or a classifier."""
    return gr.Textbox(
        "",
        label="Name",
        placeholder="letters, digits, . _ -",
        max_length=MAX_NAME,
        elem_id=f"build-{kind}-name",
    )


def description_field(kind: str) -> gr.Textbox:
    """Return the field for a sentence about it."""
    return gr.Textbox(
        "", label="Description", max_length=MAX_WORDS, elem_id=f"build-{kind}-description"
    )


def replaces_box(kind: str) -> gr.Checkbox:
    """Return the box without which nothing of the same name is replaced."""
    return gr.Checkbox(
        False, label=f"Replace a {kind} of this name", elem_id=f"build-{kind}-replaces"
    )


def show_chosen(radio: gr.Radio, values: Sequence[str], boxes: Sequence[gr.Column]) -> None:
    """Let a choice show its own box and hide the others.

    Args:
        radio: the choice.
        values: what may be chosen.
        boxes: one a value, in the same order.
    """
    radio.change(
        lambda chosen: [gr.Column(visible=chosen == value) for value in values],
        radio,
        list(boxes),
        **LIVE,
    )


async def _read(file: Any) -> list[Any]:
    if not file:  # emptied by what is below
        return [gr.skip()] * 3
    try:
        text = uploaded_text(file)
    except TrimtabError as error:
        return [problem(error), gr.skip(), None]
    return [done("The file's text is in the field."), text, None]


def named(typed: str, *, otherwise: str | None = None) -> str:
    """Return the name that was typed, or what it is called otherwise.

    Raises:
        FormError, StoredNameError: there is neither, or nothing can be stored under it.
    """
    name = typed.strip() or otherwise
    if not name:
        raise FormError("Give it a name, by which requests will ask for it.")
    return checked_name(name)


def options_of(text: str) -> dict[str, Any]:
    """Return a method's options from lines `name = value`; values are JSON, or else text.

    Raises:
        FormError: a line is none, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, sign, value = (part.strip() for part in line.partition("="))
        if not (name and sign and value):
            raise FormError(f"Line {number} of the method's options is not `name = value`.")
        if name in options:
            raise FormError(f"Line {number} of the method's options gives {name} once more.")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options

"""The form of a vector to build."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.ui.page.build_form import (
    MAX_WORDS,
    FormError,
    PastedExamples,
    description_field,
    name_field,
    named,
    options_of,
    replaces_box,
    show_chosen,
)
from trimtab.ui.page.pasted import Pasted, pasted_pairs
from trimtab.ui.page.plain_text import plain

_SOURCES = [("a bundled concept", "concept"), ("my pairs", "pairs"), ("two descriptions", "words")]


class VectorForm:
    """The fields; `inputs` are what `body` takes.

    Args:
        notice: where what happened is said.
    """

    def __init__(self, notice: gr.HTML) -> None:
        self.name = name_field("vector")
        self.source = gr.Radio(
            _SOURCES, value="concept", label="Build it from", elem_id="build-vector-source"
        )
        with gr.Column(visible=True) as concept_box:
            self.concept = gr.Dropdown([], label="Concept", elem_id="build-concept")
            self.example = gr.HTML("", elem_id="build-concept-example")
        with gr.Column(visible=False) as pairs_box:
            pasted = PastedExamples(
                "Pairs",
                hint="A line each: preferred || dispreferred (a tab does as well), or prompt || "
                "preferred || dispreferred, or JSON lines as the command line's. A third is held "
                "back, so a dozen is the least; forty or more make a useful vector.",
                elem_id="build-pairs",
                notice=notice,
            )
            self.pairs = pasted.text
        with gr.Column(visible=False) as words_box:
            self.describe = gr.Textbox(
                "",
                label="Toward",
                placeholder="warm and kind",
                max_length=MAX_WORDS,
                elem_id="build-describe",
            )
            self.against = gr.Textbox(
                "",
                label="Away from",
                placeholder="cold and distant",
                max_length=MAX_WORDS,
                elem_id="build-against",
            )
        self.method = gr.Dropdown([], label="Method", elem_id="build-method")
        self.about = gr.HTML("", elem_id="build-method-about")
        self.calibrate = gr.Checkbox(
            True,
            label="Calibrate",
            info="Measure effect and damage to choose layers and the unit of scale; takes most of "
            "the time.",
            elem_id="build-vector-calibrate",
        )
        self.map = gr.Checkbox(
            False,
            label="Map layers and scales",
            info="Measure other layers and scales too, for the heat map; more than doubles the "
            "time.",
            elem_id="build-map",
        )
        with gr.Accordion("More", open=False):
            self.description = description_field("vector")
            self.position = gr.Textbox(
                "mean",
                label="Tokens of the answer to read: mean, last, or an index",
                max_length=16,
                elem_id="build-vector-position",
            )
            self.options = gr.Textbox(
                "",
                label="The method's options, name = value a line",
                lines=2,
                max_length=2000,
                elem_id="build-options",
            )
            self.normalize = gr.Checkbox(False, label="Steering keeps the hidden state's length")
        self.replaces = replaces_box("vector")
        show_chosen(
            self.source, [value for _, value in _SOURCES], [concept_box, pairs_box, words_box]
        )
        self.inputs = [
            self.name,
            self.source,
            self.concept,
            self.pairs,
            self.describe,
            self.against,
            self.method,
            self.options,
            self.position,
            self.normalize,
            self.calibrate,
            self.map,
            self.description,
            self.replaces,
        ]

    def body(
        self,
        name: str,
        source: str,
        concept: str | None,
        pairs: str,
        describe: str,
        against: str,
        method: str | None,
        options: str,
        position: str,
        normalize: bool,
        calibrate: bool,
        is_mapped: bool,
        description: str,
        replaces: bool,
    ) -> tuple[dict[str, Any], Pasted | None]:
        """Return the body of the build's request, and the pairs it was pasted from.

        Raises:
            FormError, DataError: a field is not filled in, or a pasted line is at fault.
        """
        pasted: Pasted | None = None
        if source == "pairs":
            pasted = pasted_pairs(pairs)
            given: dict[str, Any] = {"pairs": pasted.rows}
        elif source == "words":
            if not (describe.strip() and against.strip()):
                raise FormError("Say in a few words what to move toward, and what away from.")
            given = {"describe": describe.strip(), "against": against.strip()}
        else:
            if not concept:
                raise FormError("Choose a concept, or another source.")
            given = {"concept": concept}
        fields = {
            "kind": "vector",
            "id": named(name, otherwise=given.get("concept")),
            **given,
            "method": method,
            "params": options_of(options),
            "position": _place(position),
            "normalize": normalize,
            "calibrate": calibrate,
            "map": is_mapped,
            "description": description.strip(),
            "overwrite": replaces,
        }
        return fields, pasted


def concept_html(card: dict[str, Any] | None) -> str:
    """Return what a bundled concept holds, with one of its pairs."""
    if card is None:
        return ""
    example = card["example"]
    prompt = f"asked <q>{plain(example['prompt'])}</q>, " if example.get("prompt") else ""
    return (
        f'<p class="tt-hint">{card["n_build"]} pairs to build from, {card["n_held"]} to measure '
        f"on. For example, {prompt}<q>{plain(example['preferred'])}</q> and not "
        f"<q>{plain(example['dispreferred'])}</q></p>"
    )


def method_html(card: dict[str, Any] | None) -> str:
    """Return what a method does, where it comes from, and its options with their defaults."""
    if card is None:
        return ""
    options = ", ".join(f"{name} = {value}" for name, value in card["options"].items())
    said = f" Options: {options}." if options else ""
    return f'<p class="tt-hint">{plain(card["summary"])} {plain(card["source"])}{plain(said)}</p>'


def _place(typed: str) -> int | str:
    try:
        return int(typed)
    except ValueError:
        return typed.strip() or "mean"

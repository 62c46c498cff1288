"""The form of a classifier to train."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.ui.page.build_form import (
    FormError,
    PastedExamples,
    description_field,
    name_field,
    named,
    replaces_box,
    show_chosen,
)
from trimtab.ui.page.pasted import Pasted, pasted_texts
from trimtab.ui.page.plain_text import plain

_SOURCES = [("a bundled set", "bundled"), ("my labelled texts", "texts")]
_NETWORKS = [("two hidden layers", "mlp"), ("linear", "linear")]


class ClassifierForm:
    """The fields; `inputs` are what `body` takes.

    Args:
        notice: where what happened is said.
    """

    def __init__(self, notice: gr.HTML) -> None:
        self.name = name_field("classifier")
        self.source = gr.Radio(
            _SOURCES, value="bundled", label="Train it on", elem_id="build-classifier-source"
        )
        with gr.Column(visible=True) as bundled_box:
            self.bundled = gr.Dropdown([], label="Bundled set", elem_id="build-bundled")
            self.about = gr.HTML("", elem_id="build-bundled-about")
            # Not None: a number field that is shown later makes 0 of it.
            self.own_answers = gr.Number(
                0,
                label="Read the model's own answers, tokens each (0: the prompts alone)",
                precision=0,
                elem_id="build-own-answers",
            )
        with gr.Column(visible=False) as texts_box:
            pasted = PastedExamples(
                "Labelled texts",
                hint='A line each: label || text (a tab does as well), or JSON lines {"text", '
                '"label"}, with a prompt where the text answers one.',
                elem_id="build-texts",
                notice=notice,
            )
            self.texts = pasted.text
            self.several = gr.Checkbox(
                False, label="A text may have several labels", elem_id="build-several"
            )
        self.network = gr.Radio(_NETWORKS, value="mlp", label="Network", elem_id="build-network")
        self.calibrate = gr.Checkbox(
            True,
            label="Calibrate",
            info="Measure how far each label may be steered; takes most of the time.",
            elem_id="build-classifier-calibrate",
        )
        with gr.Accordion("More", open=False):
            self.description = description_field("classifier")
            self.seed = gr.Number(0, label="Seed of the split and the weights", precision=0)
        self.replaces = replaces_box("classifier")
        show_chosen(self.source, [value for _, value in _SOURCES], [bundled_box, texts_box])
        self.inputs = [
            self.name,
            self.source,
            self.bundled,
            self.own_answers,
            self.texts,
            self.several,
            self.network,
            self.calibrate,
            self.description,
            self.seed,
            self.replaces,
        ]

    def body(
        self,
        name: str,
        source: str,
        bundled: str | None,
        own_answers: float | None,
        texts: str,
        several: bool,
        network: str,
        calibrate: bool,
        description: str,
        seed: float | None,
        replaces: bool,
    ) -> tuple[dict[str, Any], Pasted | None]:
        """Return the body of the build's request, and the texts it was pasted from.

        Raises:
            FormError, DataError: a field is not filled in, or a pasted line is at fault.
        """
        pasted: Pasted | None = None
        if source == "texts":
            pasted = pasted_texts(texts)
            given: dict[str, Any] = {"texts": pasted.rows, "is_exclusive": not several}
        else:
            if not bundled:
                raise FormError("Choose a bundled set, or another source.")
            given = {"bundled": bundled}
            if own_answers:
                given["own_answer_tokens"] = int(own_answers)
        fields = {
            "kind": "classifier",
            "id": named(name, otherwise=given.get("bundled")),
            **given,
            "network": network,
            "calibrate": calibrate,
            "seed": int(seed or 0),
            "description": description.strip(),
            "overwrite": replaces,
        }
        return fields, pasted


def bundled_html(card: dict[str, Any] | None) -> str:
    """Return what a bundled set holds."""
    if card is None:
        return ""
    labels = ", ".join(map(plain, card["labels"]))
    return f'<p class="tt-hint">{card["n_examples"]} examples of {labels}.</p>'

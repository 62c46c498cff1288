"""The Why tab: which words of the prompt made the model say this, and what steering did to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import note, problem
from trimtab.ui.page.plain_text import plain
from trimtab.ui.page.visitor import Visitors
from trimtab.ui.page.why_question import (
    STEERED,
    TYPED,
    WHATS,
    How,
    question_of,
    read_options,
)
from trimtab.ui.page.why_run import Explanation
from trimtab.ui.page.why_view import progress_html, result_html

_DEFAULT = ("the server's default", "")
_ABOUT_DEFAULT = (
    "AttnLRP where the model has rules for it and the server offers it, else kernel_shap."
)
_MAX_CHARS = 8000
_MAX_OPTIONS_CHARS = 1000


class WhyTab:
    """The tab's components and what happens when they are used.

    Args:
        visitors: who is on the page.
        tab: the tab itself; what it offers is read when it is opened.
    """

    def __init__(self, visitors: Visitors, tab: gr.Tab) -> None:
        self.visitors = visitors
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.what = gr.Radio(
                    list(WHATS), value=STEERED, label="What to explain", elem_id="why-what"
                )
                with gr.Column(visible=False) as self.typed:
                    self.texts = [
                        gr.Textbox(
                            "",
                            label=label,
                            lines=2,
                            max_lines=8,
                            max_length=_MAX_CHARS,
                            elem_id=f"why-{name}",
                        )
                        for name, label in (
                            ("prompt", "Prompt"),
                            ("preferred", "Preferred answer"),
                            (
                                "dispreferred",
                                "Dispreferred answer (empty: explain the other alone)",
                            ),
                        )
                    ]
                self.method = gr.Dropdown(
                    [_DEFAULT],
                    value="",
                    label="Method",
                    allow_custom_value=True,
                    elem_id="why-method",
                )
                self.about = gr.HTML(_hint(_ABOUT_DEFAULT), elem_id="why-about")
                self.is_compared = gr.Checkbox(
                    label="Also the difference that the steering makes",
                    info="The same answer under the last chat's steering and without it: twice "
                    "the work.",
                    elem_id="why-compare",
                )
                with gr.Accordion("More", open=False, elem_id="why-more"):
                    self.options = gr.Textbox(
                        "",
                        label="The method's options",
                        info="Empty: its defaults, shown above.",
                        placeholder="samples=256, seed=1",
                        max_length=_MAX_OPTIONS_CHARS,
                        elem_id="why-options",
                    )
                    self.is_measured = gr.Checkbox(
                        label="Check faithfulness",
                        info="Takes tokens away by score, and in random order beside it: about "
                        "150 rows more.",
                        elem_id="why-faithfulness",
                    )
                with gr.Row():
                    self.explain = gr.Button("Explain", variant="primary", elem_id="why-explain")
                    self.cancel = gr.Button("Cancel", elem_id="why-cancel", min_width=80)
            with gr.Column(scale=3, min_width=320):
                self.notice = gr.HTML("", elem_id="why-notice")
                self.progress = gr.HTML("", elem_id="why-progress")
                self.result = gr.HTML("", elem_id="why-result")
        self._wire(tab)

    def _wire(self, tab: gr.Tab) -> None:
        # Nothing waits for an explanation before it: a new one ends the old.
        live: dict[str, Any] = {**LIVE, "trigger_mode": "multiple"}
        tab.select(self._opened, None, [self.method, self.notice], **live)
        self.what.change(self._chosen, self.what, self.typed, **live)
        self.method.change(self._described, self.method, self.about, **live)
        self.explain.click(
            self._explained,
            [
                self.what,
                self.is_compared,
                self.method,
                self.options,
                self.is_measured,
                *self.texts,
            ],
            [self.notice, self.progress, self.result],
            **live,
        )
        self.cancel.click(self._cancelled, None, None, **live)

    async def _opened(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        said = ""
        if not visitor.chat.turns:
            said = note(
                "There is no answer yet: ask something in Chat first, or type a prompt and "
                f"answers under “{TYPED}”."
            )
        try:
            names = [card["id"] for card in await _methods(visitor.api)]
        except TrimtabError as error:
            return [gr.skip(), problem(error)]
        return [gr.Dropdown(choices=[_DEFAULT, *names]), said]

    async def _chosen(self, request: gr.Request, what: str) -> Any:
        return gr.Column(visible=what == TYPED)

    async def _described(self, request: gr.Request, method: str | None) -> str:
        if not method:
            return _hint(_ABOUT_DEFAULT)
        try:
            cards = await _methods(self.visitors.of(request).api)
        except TrimtabError as error:
            return problem(error)
        return about_html({card["id"]: card for card in cards}.get(method))

    async def _explained(
        self,
        request: gr.Request,
        what: str,
        is_compared: bool,
        method: str | None,
        options: str,
        is_measured: bool,
        *texts: str,
    ) -> AsyncIterator[list[Any]]:
        visitor = self.visitors.of(request)
        visitor.explaining.clear()
        prompt, preferred, dispreferred = texts
        try:
            question = question_of(
                what,
                visitor.chat,
                prompt=prompt,
                preferred=preferred,
                dispreferred=dispreferred,
                is_compared=is_compared,
            )
            how = How(method or "", read_options(options), is_measured=is_measured)
            model = await visitor.model()
        except TrimtabError as error:
            yield [problem(error), "", gr.skip()]
            return
        explanation = Explanation(question, how)
        n_shown = 0
        shown: Any = ""  # the old result goes as the new one begins
        async for _ in visitor.explaining.run(visitor.api, explanation, model=model):
            if len(explanation.results) > n_shown:
                n_shown = len(explanation.results)
                # Thousands of tokens take a while to draw, and others wait for this loop.
                shown = await asyncio.to_thread(result_html, explanation)
                if not visitor.explaining.is_latest(explanation):
                    return
            yield [_said(explanation), progress_html(explanation), shown]
            shown = gr.skip()

    async def _cancelled(self, request: gr.Request) -> None:
        self.visitors.of(request).explaining.stop()


def about_html(card: dict[str, Any] | None) -> str:
    """Return what a method does, where it comes from and its options.

    Args:
        card: of GET /v1/attributions/methods; None for one that is not in it.
    """
    if card is None:
        return _hint("The server does not list this method.")
    options = ", ".join(f"{name}={value}" for name, value in card["params"].items())
    return _hint(card["summary"], f"Options: {options or 'none'}.", f"Source: {card['source']}")


def _hint(*lines: str) -> str:
    return "".join(f'<p class="tt-hint">{plain(line)}</p>' for line in lines)


def _said(explanation: Explanation) -> str:
    if explanation.error is not None:
        return problem(explanation.error)
    return note("Cancelled.") if explanation.is_cancelled else ""


async def _methods(api: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.get("/v1/attributions/methods"))["data"]
    return found

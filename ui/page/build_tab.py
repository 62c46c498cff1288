"""The Build tab: make a vector or a classifier, watch it come, see what it does, and try it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.api import Api, RefusedError
from trimtab.ui.page.build_form import FormError, show_chosen
from trimtab.ui.page.build_offers import offers
from trimtab.ui.page.build_outcome import BuildOutcome
from trimtab.ui.page.build_watch import PATH, is_under_way
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.classifier_form import ClassifierForm, bundled_html
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import problem
from trimtab.ui.page.pasted import Pasted
from trimtab.ui.page.vector_form import VectorForm, concept_html, method_html
from trimtab.ui.page.visitor import Visitors

_KINDS = ["vector", "classifier"]
_TAKEN = 409


class BuildTab:
    """The tab's components and what happens when they are used.

    Args:
        visitors: who is on the page.
        tab: the tab itself, within which this is made; what there is to build from, and what is
            being built, are asked for when it opens.
        tabs: all tabs, among them the chat's.
        chat: where what was built may be tried.
    """

    def __init__(self, visitors: Visitors, *, tab: gr.Tab, tabs: gr.Tabs, chat: ChatTab) -> None:
        self.visitors, self.chat = visitors, chat
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.kind = gr.Radio(_KINDS, value="vector", label="Make a", elem_id="build-kind")
                self.notice = gr.HTML("", elem_id="build-notice", render=False)
                with gr.Column(visible=True) as vector_box:
                    self.vector = VectorForm(self.notice)
                with gr.Column(visible=False) as classifier_box:
                    self.classifier = ClassifierForm(self.notice)
                self.start = gr.Button("Build", variant="primary", elem_id="build-start")
                self.notice.render()
            with gr.Column(scale=3, min_width=300, elem_id="build-outcome"):
                self.outcome = BuildOutcome(visitors, self.notice)
        self.outcome.wire(tabs=tabs, chat=chat)
        show_chosen(self.kind, _KINDS, [vector_box, classifier_box])
        self._wire(tab, chat)

    def _wire(self, tab: gr.Tab, chat: ChatTab) -> None:
        vector, classifier, outcome = self.vector, self.classifier, self.outcome
        chosen = [vector.concept, vector.method, classifier.bundled]
        abouts = [vector.example, vector.about, classifier.about]
        tab.select(self._opened, chosen, [self.notice, *chosen, *abouts], **LIVE).then(
            outcome.resume, None, outcome.shown, trigger_mode="multiple", **LIVE
        ).then(self._chat_refreshed, None, chat.offered, **LIVE)
        gr.on([one.input for one in chosen], self._explained, chosen, abouts, **LIVE)
        # Not once at a time: a build may be started while another is watched.
        self.start.click(
            self._started,
            [self.kind, *vector.inputs, *classifier.inputs],
            outcome.shown,
            trigger_mode="multiple",
            **LIVE,
        ).then(self._chat_refreshed, None, chat.offered, **LIVE)

    async def _opened(
        self, request: gr.Request, concept: str | None, method: str | None, bundled: str | None
    ) -> list[Any]:
        """Ask what there is to build from, and keep what is chosen of it."""
        try:
            found = await offers(self.visitors.of(request).api)
        except TrimtabError as error:
            return [problem(error), *[gr.skip()] * 6]
        concept = concept or next(iter(found.concepts), None)
        method = method or found.default_method
        bundled = bundled or next(iter(found.sets), None)
        return [
            "",
            gr.Dropdown(choices=list(found.concepts), value=concept),
            gr.Dropdown(choices=list(found.methods), value=method),
            gr.Dropdown(choices=list(found.sets), value=bundled),
            concept_html(found.concepts.get(concept or "")),
            method_html(found.methods.get(method or "")),
            bundled_html(found.sets.get(bundled or "")),
        ]

    async def _explained(
        self, request: gr.Request, concept: str | None, method: str | None, bundled: str | None
    ) -> list[Any]:
        return (await self._opened(request, concept, method, bundled))[-3:]

    async def _started(
        self, request: gr.Request, kind: str, *values: Any
    ) -> AsyncIterator[list[Any]]:
        visitor = self.visitors.of(request)
        n = len(self.vector.inputs)
        pasted: Pasted | None = None
        # What was wrong before is not wrong now, and the same again is spoken again.
        yield self.outcome.said("")
        try:
            # In a thread: a megabyte of examples takes a while to read.
            if kind == "vector":
                body, pasted = await asyncio.to_thread(self.vector.body, *values[:n])
            else:
                body, pasted = await asyncio.to_thread(self.classifier.body, *values[n:])
            # One after the other: of two presses the second finds the first one's build.
            async with visitor.watching.starting:
                await _check_free(visitor.api, kind, body["id"])
                state = await visitor.api.post(PATH, body)
        except TrimtabError as error:
            said = error.message if pasted is None else pasted.in_lines(error.message)
            if isinstance(error, RefusedError) and error.http_status == _TAKEN:
                said += f" Here, tick that a {kind} of this name is replaced."
            yield self.outcome.said(problem(said))
            return
        async for shown in self.outcome.follow(visitor, state["id"]):
            yield shown

    async def _chat_refreshed(self, request: gr.Request) -> list[Any]:
        """Offer in the chat what is stored now."""
        try:
            return await self.chat.refresh(request)
        except TrimtabError:
            return [gr.skip()] * 2  # the build's side has said what is wrong


async def _check_free(api: Api, kind: str, name: str) -> None:
    """Look whether one of this name is on its way: replacing it as well would build it twice.

    Raises:
        FormError: it is.
    """
    try:
        states = (await api.get(PATH))["data"]
    except TrimtabError:
        return  # whether it may be built is the server's to say, when it is asked to
    for state in states:
        if is_under_way(state) and (state["kind"], state["artifact"]) == (kind, name):
            raise FormError(
                f"A {kind} {name} is being built already: wait for it, cancel it, or choose "
                "another name."
            )

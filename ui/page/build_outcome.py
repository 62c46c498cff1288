"""The Build tab's right side: the builds on the server, how far one is, and what it came to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.api import RefusedError
from trimtab.ui.page.build_view import (
    build_label,
    end_html,
    progress_html,
    result_html,
    stage_html,
)
from trimtab.ui.page.build_watch import PATH, build_path, is_under_way
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.download import Download, file_value
from trimtab.ui.page.library import Item
from trimtab.ui.page.library_try import try_in_chat
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import problem
from trimtab.ui.page.visitor import Visitor, Visitors

_CANCEL, _EXPORT = "Cancel", "Export GGUF"
_GONE = 404


class BuildOutcome:
    """The components, and what happens when they are used.

    Args:
        visitors: who is on the page.
        notice: where errors are said.
    """

    def __init__(self, visitors: Visitors, notice: gr.HTML) -> None:
        self.visitors, self.notice = visitors, notice
        with gr.Row():
            self.which = gr.Dropdown(
                [], label="Builds on this server", elem_id="build-which", scale=4, min_width=180
            )
            self.cancel = gr.Button(
                _CANCEL, elem_id="build-cancel", interactive=False, min_width=90, scale=1
            )
        self.stage = gr.HTML("", elem_id="build-stage")
        self.progress = gr.HTML("", elem_id="build-progress")
        self.end = gr.HTML("", elem_id="build-end")
        with gr.Row(visible=False, elem_id="build-actions") as self.actions:
            self.try_it = gr.Button(
                "Try it in Chat", variant="primary", elem_id="build-try", min_width=110
            )
            self.save = gr.Button("Download", elem_id="build-download", min_width=110)
            self.gguf = gr.Button(_EXPORT, elem_id="build-gguf", min_width=110)
        self.result = gr.HTML("", elem_id="build-result")
        self.download = Download(elem_id="build-file-out")
        self.shown = [
            notice,
            self.which,
            self.cancel,
            self.stage,
            self.progress,
            self.end,
            self.actions,
            self.gguf,
            self.result,
        ]

    def wire(self, *, tabs: gr.Tabs, chat: ChatTab) -> None:
        """Say what the components do.

        Args:
            tabs: all tabs, among them the chat's.
            chat: where what was built may be tried.
        """
        # Nothing waits for the build that was watched before: its watch ends by itself.
        self.which.input(self._chosen, self.which, self.shown, trigger_mode="multiple", **LIVE)
        self.cancel.click(self._cancelled, self.which, self.notice, **LIVE)
        self.try_it.click(
            self._tried, self.which, [self.notice, *chat.offered, chat.notice, tabs], **LIVE
        )
        file_out = [self.notice, self.download.place]
        self.download.forget(self.save.click(self._saved, self.which, file_out, **LIVE))
        self.download.forget(self.gguf.click(self._exported, self.which, file_out, **LIVE))

    def said(self, html: str) -> list[Any]:
        """Return the values of `shown` that say something and leave all else."""
        return [html, *[gr.skip()] * (len(self.shown) - 1)]

    async def resume(self, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show the builds, and watch the one this visitor watched or the newest that runs."""
        visitor = self.visitors.of(request)
        try:
            states = (await visitor.api.get(PATH))["data"]
        except TrimtabError as error:
            yield self.said(problem(error))
            return
        ids = [state["id"] for state in states]
        under_way = next((state["id"] for state in states if is_under_way(state)), None)
        last = visitor.watching.build
        build = last if last in ids else under_way
        if build is None:
            yield [gr.skip(), _choices(states, None), *[gr.skip()] * (len(self.shown) - 2)]
            return
        async for shown in self.follow(visitor, build):
            yield shown

    async def follow(self, visitor: Visitor, build: str) -> AsyncIterator[list[Any]]:
        """Yield the values of `shown` while a build goes on, until it is over.

        Args:
            visitor: who watches.
            build: its id.
        """
        before: dict[str, Any] = {}
        try:
            async for state in visitor.watching.watch(visitor.api, build):
                which: Any = gr.skip()
                if state["status"] != before.get("status"):
                    which = _choices((await visitor.api.get(PATH))["data"], build)
                    if visitor.watching.build != build:  # another was chosen meanwhile
                        return
                yield self._shown(state, before, which)
                before = state
        except TrimtabError as error:
            is_gone = isinstance(error, RefusedError) and error.http_status == _GONE
            yield self._nothing(problem(error)) if is_gone else self.said(problem(error))

    def _nothing(self, said: str) -> list[Any]:
        """Return the values of `shown` when the build that was watched is gone."""
        return [
            said,
            gr.Dropdown(value=None),
            gr.Button(value=_CANCEL, interactive=False),
            *[""] * 3,
            gr.Row(visible=False),
            gr.skip(),
            "",
        ]

    def _shown(self, state: dict[str, Any], before: dict[str, Any], which: Any) -> list[Any]:
        def changed(new: str, old: str | None) -> Any:
            return gr.skip() if new == old else new

        card, is_new = state["result"], state["status"] != before.get("status")
        return [
            "" if not before else gr.skip(),
            which,
            # With its label each time: in a stream of updates Gradio drops what a later one skips.
            gr.Button(value=_CANCEL, interactive=is_under_way(state)),
            # Screen readers speak it again whenever it is set, changed or not.
            changed(stage_html(state), stage_html(before) if before else None),
            progress_html(state),
            end_html(state) if is_new else gr.skip(),
            gr.Row(visible=card is not None) if is_new else gr.skip(),
            gr.Button(value=_EXPORT, visible=state["kind"] == "vector"),
            result_html(state) if is_new else gr.skip(),
        ]

    async def _chosen(self, request: gr.Request, build: str | None) -> AsyncIterator[list[Any]]:
        if not build:  # leaving the empty list by keyboard tells of a choice too
            return
        async for shown in self.follow(self.visitors.of(request), build):
            yield shown

    async def _cancelled(self, request: gr.Request, build: str | None) -> Any:
        api = self.visitors.of(request).api
        try:
            # One that is over would be forgotten by the same request.
            if build and is_under_way(await api.get(build_path(build))):
                await api.delete(build_path(build))
        except TrimtabError as error:
            return problem(error)
        return gr.skip()

    async def _tried(self, request: gr.Request, build: str | None) -> list[Any]:
        api = self.visitors.of(request).api
        try:
            item = await self._built(request, build)
            return await try_in_chat(api, item, await api.get(item.path))
        except TrimtabError as error:
            return [problem(error), *[gr.skip()] * 4]

    async def _saved(self, request: gr.Request, build: str | None) -> list[Any]:
        return await self._file(request, build, "safetensors")

    async def _exported(self, request: gr.Request, build: str | None) -> list[Any]:
        return await self._file(request, build, "gguf")

    async def _file(self, request: gr.Request, build: str | None, form: str) -> list[Any]:
        api = self.visitors.of(request).api
        try:
            item = await self._built(request, build)
            data = await api.get_bytes(f"{item.path}/content", format=form)
        except TrimtabError as error:
            return [problem(error), None]
        return ["", file_value(f"{item.id}.{form}", data)]

    async def _built(self, request: gr.Request, build: str | None) -> Item:
        if not build:
            raise ServerError("Choose a build first.")
        state = await self.visitors.of(request).api.get(build_path(build))
        if state["result"] is None:
            raise ServerError("This build has stored nothing; choose one that is done.")
        return Item(state["kind"], state["artifact"])


def _choices(states: list[dict[str, Any]], build: str | None) -> gr.Dropdown:
    return gr.Dropdown(choices=[(build_label(state), state["id"]) for state in states], value=build)

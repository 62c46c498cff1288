"""The Library tab: what is stored, where it comes from, how alike it is, and how it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.download import Download, file_value
from trimtab.ui.page.library import KINDS, Item, Library, stored
from trimtab.ui.page.library_card import card_html
from trimtab.ui.page.library_list import ORDERS, list_html
from trimtab.ui.page.library_removal import LibraryRemoval
from trimtab.ui.page.library_try import chat_settings, without
from trimtab.ui.page.library_upload import LibraryUpload
from trimtab.ui.page.notice import done, problem
from trimtab.ui.page.similarities import Similarities
from trimtab.ui.page.visitor import Visitors

_SCRIPT = (Path(__file__).parent / "library_list.js").read_text(encoding="utf-8")
_EMPTY = '<p class="tt-empty">Choose something from the list.</p>'
_LIVE: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}


class LibraryTab:
    """The tab's components and what happens when they are used.

    Args:
        visitors: who is on the page.
        tab: the tab itself, within which this is made; what is stored is asked for when it opens.
        tabs: all tabs, among them the chat's.
        chat: where something may be tried.
    """

    def __init__(self, visitors: Visitors, *, tab: gr.Tab, tabs: gr.Tabs, chat: ChatTab) -> None:
        self.visitors, self.chat = visitors, chat
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.kind = gr.Radio(
                    [(plural.capitalize(), kind) for kind, plural in KINDS.items()],
                    value="vector",
                    label="What is stored",
                    elem_id="library-kind",
                )
                with gr.Row():
                    self.search = gr.Textbox(
                        label="Search", elem_id="library-search", max_length=200, min_width=120
                    )
                    self.order = gr.Dropdown(
                        list(ORDERS.items()),
                        value="up",
                        label="Order",
                        elem_id="library-order",
                        min_width=120,
                    )
                self.list = gr.HTML("", js_on_load=_SCRIPT, elem_id="library-list")
                self.refresh = gr.Button("Refresh", size="sm", elem_id="library-refresh")
            with gr.Column(scale=3, min_width=300):
                self.notice = gr.HTML("", elem_id="library-notice")
                with gr.Row(visible=False, elem_id="library-actions") as self.actions:
                    self.try_it = gr.Button(
                        "Try in Chat", variant="primary", elem_id="library-try", min_width=110
                    )
                    self.save = gr.Button("Download", elem_id="library-download", min_width=110)
                    self.gguf = gr.Button("Export GGUF", elem_id="library-gguf", min_width=110)
                    self.delete = gr.Button("Delete…", elem_id="library-delete", min_width=110)
                self.removal = LibraryRemoval(visitors, self.notice)
                self.detail = gr.HTML(_EMPTY, elem_id="library-detail")
                self.similarities = Similarities(visitors)
        with gr.Row():
            self.upload = LibraryUpload(visitors, self.notice)
        self.download = Download(elem_id="library-file-out")
        self._wire(tab, tabs)

    @property
    def _shown(self) -> list[Any]:
        return [
            self.list,
            self.detail,
            self.actions,
            self.gguf,
            self.removal.box,
            *self.similarities.shown,
        ]

    def _wire(self, tab: gr.Tab, tabs: gr.Tabs) -> None:
        choices = [self.kind, self.search, self.order, self.similarities.layer]
        all_of_it = [self.notice, *self._shown]
        gr.on([tab.select, self.refresh.click], self._opened, choices, all_of_it, **_LIVE)
        self.kind.change(self._another_kind, choices, all_of_it, **_LIVE)
        gr.on(
            [self.search.input, self.order.change],
            self._listed,
            [self.kind, self.search, self.order],
            self.list,
            trigger_mode="always_last",
            **_LIVE,
        )
        self.list.select(self._chosen, choices, all_of_it, **_LIVE)
        self.try_it.click(self._tried, None, [self.notice, self.chat.panel, tabs], **_LIVE)
        file_out = [self.notice, self.download.place]
        self.download.forget(self.save.click(self._saved, None, file_out, **_LIVE))
        self.download.forget(self.gguf.click(self._exported, None, file_out, **_LIVE))
        self.removal.wire(self.delete, self.notice)
        panel = [self.kind, self.chat.panel]
        for changed in (self.removal.deleted, self.upload.stored):
            changed.then(self._changed, choices, [self.kind, *self._shown], **_LIVE).then(
                self._chat_refreshed, panel, self.chat.panel, **_LIVE
            )

    async def _opened(
        self, request: gr.Request, kind: str, search: str, order: str, layer: str
    ) -> list[Any]:
        """Ask anew what is stored, and show it."""
        shown = await self._fresh(request, kind, search, order, layer)
        return shown if len(shown) > 1 else [*shown, *[gr.skip()] * len(self._shown)]

"""The Library tab: what is stored, where it comes from, how alike it is, and how it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.catalogue import catalogue
from trimtab.ui.page.chat_tab import ChatTab, offering
from trimtab.ui.page.chat_view import PLAIN
from trimtab.ui.page.download import Download, file_value
from trimtab.ui.page.library import KINDS, Item, Library, stored
from trimtab.ui.page.library_card import card_html
from trimtab.ui.page.library_list import ORDERS, list_html
from trimtab.ui.page.library_removal import LibraryRemoval
from trimtab.ui.page.library_try import try_in_chat, without
from trimtab.ui.page.library_upload import LibraryUpload
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import problem
from trimtab.ui.page.similarities import Similarities
from trimtab.ui.page.visitor import Visitor, Visitors

_SCRIPT = (Path(__file__).parent / "library_list.js").read_text(encoding="utf-8")
_EMPTY = '<p class="tt-empty">Choose something from the list.</p>'


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
            with gr.Column(scale=1, min_width=340):
                self.kind = gr.Radio(
                    [(plural.capitalize(), kind) for kind, plural in KINDS.items()],
                    value="vector",
                    label="What is stored",
                    show_label=False,
                    container=False,
                    elem_id="library-kind",
                )
                with gr.Row():
                    self.search = gr.Textbox(
                        label="Search", elem_id="library-search", max_length=200, min_width=130
                    )
                    self.order = gr.Dropdown(
                        list(ORDERS.items()),
                        value="up",
                        label="Order",
                        elem_id="library-order",
                        min_width=130,
                    )
                self.list = gr.HTML("", js_on_load=_SCRIPT, elem_id="library-list")
                self.refresh = gr.Button("Refresh", size="sm", elem_id="library-refresh")
                self.notice = gr.HTML("", elem_id="library-notice", render=False)
                self.upload = LibraryUpload(visitors, self.notice)
            with gr.Column(scale=3, min_width=300):
                self.notice.render()
                with gr.Row(visible=False, elem_id="library-actions") as self.actions:
                    self.try_it = gr.Button(
                        "Try in Chat",
                        variant="primary",
                        elem_id="library-try",
                        min_width=110,
                        size="md",
                    )
                    self.save = gr.Button(
                        "Download", elem_id="library-download", min_width=110, size="md"
                    )
                    self.gguf = gr.Button(
                        "Export GGUF", elem_id="library-gguf", min_width=110, size="md"
                    )
                    self.delete = gr.Button(
                        "Delete…", elem_id="library-delete", min_width=110, size="md"
                    )
                self.removal = LibraryRemoval(visitors, self.notice)
                self.detail = gr.HTML(_EMPTY, elem_id="library-detail")
                self.similarities = Similarities(visitors)
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
        gr.on([tab.select, self.refresh.click], self._opened, choices, all_of_it, **LIVE)
        self.kind.input(self._another_kind, choices, all_of_it, **LIVE)
        gr.on(
            [self.search.change, self.order.change],
            self._listed,
            [self.kind, self.search, self.order],
            self.list,
            trigger_mode="always_last",
            **LIVE,
        )
        # Each press: of those that come while one is answered, Gradio would drop the last.
        self.list.select(self._chosen, choices, all_of_it, trigger_mode="multiple", **LIVE)
        self.try_it.click(
            self._tried, None, [self.notice, *self.chat.offered, self.chat.notice, tabs], **LIVE
        )
        file_out = [self.notice, self.download.place]
        self.download.forget(self.save.click(self._saved, None, file_out, **LIVE))
        self.download.forget(self.gguf.click(self._exported, None, file_out, **LIVE))
        self.removal.wire(self.delete, self.notice)
        for changed in (self.removal.deleted, self.upload.stored):
            changed.then(self._changed, choices, [self.kind, *self._shown], **LIVE).then(
                self._chat_refreshed, self.chat.offered, self.chat.offered, **LIVE
            )

    async def _opened(
        self, request: gr.Request, kind: str, search: str, order: str, layer: str
    ) -> list[Any]:
        """Ask anew what is stored, and show it."""
        return await self._all(self.visitors.of(request), kind, search, order, layer)

    async def _another_kind(
        self, request: gr.Request, kind: str, search: str, order: str, layer: str
    ) -> list[Any]:
        visitor = self.visitors.of(request)
        visitor.browsing.chosen = None
        return await self._all(visitor, kind, search, order, layer)

    async def _chosen(
        self,
        request: gr.Request,
        event: gr.EventData,
        kind: str,
        search: str,
        order: str,
        layer: str,
    ) -> list[Any]:
        visitor = self.visitors.of(request)
        browsing, press = visitor.browsing, getattr(event, "press", 0)
        if press >= browsing.press:
            browsing.press = press
            browsing.chosen = Item(kind, str(getattr(event, "id", "")))
        return await self._all(visitor, kind, search, order, layer)

    async def _changed(
        self, request: gr.Request, kind: str, search: str, order: str, layer: str
    ) -> list[Any]:
        """Show what is stored now; what was just added, whatever kind was listed before."""
        visitor = self.visitors.of(request)
        kind = visitor.browsing.chosen.kind if visitor.browsing.chosen else kind
        _, *shown = await self._all(visitor, kind, search, order, layer)
        return [kind, *shown]

    async def _all(
        self, visitor: Visitor, kind: str, search: str, order: str, layer: str
    ) -> list[Any]:
        """Return the notice and the values of `_shown`, from what is stored now."""
        browsing, notice = visitor.browsing, ""
        # One after the other: whoever presses twice sees the second last.
        async with browsing.showing:
            try:
                library = browsing.library = await stored(visitor.api)
                item = browsing.chosen
                if item is not None and item not in library:
                    browsing.chosen = None
                    # The server says why: it is gone, or its file can no longer be read.
                    await visitor.api.get(item.path)
            except TrimtabError as error:
                notice = problem(error)
            if browsing.library is None:
                return [notice, *[gr.skip()] * len(self._shown)]
            chosen = browsing.chosen
            if chosen is not None and chosen not in browsing.library:
                chosen = None  # pressed meanwhile, and gone as well: its own turn says so
            similarities = await self.similarities.show(visitor, kind, layer)
            if browsing.to_delete != chosen:
                browsing.to_delete = None
            return [
                notice,
                self._list(visitor, kind, search, order),
                _EMPTY if chosen is None else _detail(chosen, browsing.library),
                gr.Row(visible=chosen is not None),
                gr.Button(visible=chosen is not None and chosen.kind == "vector"),
                gr.Column(visible=browsing.to_delete is not None),
                *similarities,
            ]

    async def _listed(self, request: gr.Request, kind: str, search: str, order: str) -> str:
        return self._list(self.visitors.of(request), kind, search, order)

    def _list(self, visitor: Visitor, kind: str, search: str, order: str) -> str:
        browsing = visitor.browsing
        if browsing.library is None:
            return ""
        return list_html(browsing.library, kind, search=search, order=order, chosen=browsing.chosen)

    async def _tried(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        try:
            item, card = await self._card(visitor)
            return await try_in_chat(visitor.api, item, card)
        except TrimtabError as error:
            return [problem(error), *[gr.skip()] * 4]

    async def _saved(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        try:
            item, card = await self._card(visitor)
            if item.kind == "preset":
                spec = json.dumps(card["spec"], indent=2, ensure_ascii=False)
                return ["", file_value(f"{item.id}.json", spec.encode())]
            data = await visitor.api.get_bytes(f"{item.path}/content", format="safetensors")
        except TrimtabError as error:
            return [problem(error), None]
        return ["", file_value(f"{item.id}.safetensors", data)]

    async def _exported(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        try:
            item, _ = await self._card(visitor)
            data = await visitor.api.get_bytes(f"{item.path}/content", format="gguf")
        except TrimtabError as error:
            return [problem(error), None]
        return ["", file_value(f"{item.id}.gguf", data)]

    async def _card(self, visitor: Visitor) -> tuple[Item, dict[str, Any]]:
        item = visitor.browsing.chosen
        if item is None:
            raise ServerError("Choose something from the list first.")
        return item, await visitor.api.get(item.path)

    async def _chat_refreshed(self, request: gr.Request, settings: Any, colour: str) -> list[Any]:
        """Offer in the chat what is stored now, and take out of it what was deleted here."""
        browsing = self.visitors.of(request).browsing
        item, browsing.deleted = browsing.deleted, None
        try:
            offered = await catalogue(self.visitors.of(request).api)
        except TrimtabError:
            return [gr.skip()] * 2  # the list has said what is wrong
        if item is None:
            return offering(offered)
        is_colour_gone = item.id == colour and colour not in offered["readers"]
        return offering(
            offered,
            settings=without(settings, item) if settings else None,
            colour=PLAIN if is_colour_gone else None,
        )


def _detail(item: Item, library: Library) -> str:
    return card_html(item, library.cards[item.kind][item.id], library)

"""Deleting from the Library: asked for, named with what it breaks, and then done."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.library import Item, Library, stored
from trimtab.ui.page.library_list import text
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import done, problem
from trimtab.ui.page.visitor import Visitors

_FOCUS = "() => { document.querySelector('%s').focus(); }"


class LibraryRemoval:
    """The second step of a deletion. Hidden until `ask` is called.

    Args:
        visitors: who is on the page.
        notice: where what happened is said.
    """

    def __init__(self, visitors: Visitors, notice: gr.HTML) -> None:
        self.visitors = visitors
        with gr.Column(visible=False, elem_id="library-confirm") as self.box:
            self.question = gr.HTML("", elem_id="library-question")
            with gr.Row():
                self.sure = gr.Button("Delete it", variant="stop", elem_id="library-sure")
                self.keep = gr.Button("Keep it", elem_id="library-keep")
        self.deleted = self.sure.click(self._deleted, None, [notice, self.box], **LIVE)
        kept = self.keep.click(self._kept, None, self.box, **LIVE)
        # The buttons that were pressed are hidden now; the keyboard goes on from these.
        kept.then(None, js=_FOCUS % "#library-delete")
        self.deleted.then(None, js=_FOCUS % "#library-list button, #library-refresh")

    def wire(self, button: gr.Button, notice: gr.HTML) -> None:
        """Let a button ask about what the visitor has chosen."""
        button.click(
            self._asked,
            None,
            [notice, self.box, self.question, self.sure],
            **LIVE,
        )

    async def _asked(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        browsing = visitor.browsing
        async with browsing.showing:
            item = browsing.chosen
            try:
                if item is None:
                    raise ServerError("Choose what to delete first.")
                library = await stored(visitor.api)
            except TrimtabError as error:
                return [problem(error), gr.skip(), gr.skip(), gr.skip()]
            browsing.to_delete = item
            return ["", gr.Column(visible=True), question_html(item, library), f"Delete {item}"]

    async def _deleted(self, request: gr.Request) -> list[Any]:
        visitor = self.visitors.of(request)
        item, visitor.browsing.to_delete = visitor.browsing.to_delete, None
        hidden = gr.Column(visible=False)
        if item is None:
            return [gr.skip(), hidden]
        try:
            await visitor.api.delete(item.path)
        except TrimtabError as error:
            return [problem(error), hidden]
        visitor.browsing.deleted = item
        if visitor.browsing.chosen == item:
            visitor.browsing.chosen = None
        return [done(f"Deleted {item}."), hidden]

    async def _kept(self, request: gr.Request) -> Any:
        self.visitors.of(request).browsing.to_delete = None
        return gr.Column(visible=False)


def question_html(item: Item, library: Library) -> str:
    """Return what somebody must know before something is deleted.

    Args:
        item: what is to go.
        library: all that is stored.
    """
    said = f"Delete {item}? It cannot be brought back; requests that run keep it to their end."
    if item.kind == "preset":
        card = library.cards["preset"].get(item.id, {})
        said += f" Its model name {card.get('model', item.id)} goes with it; what it names stays."
    presets = library.presets_naming(item)
    rows = "".join(f"<li>{text(name)}</li>" for name in presets)
    fails = (
        f"<p>{'These presets name' if len(presets) > 1 else 'This preset names'} it, and every "
        f"request for {'them' if len(presets) > 1 else 'it'} will fail:</p><ul>{rows}</ul>"
    )
    return (
        f'<div class="tt-notice tt-problem" role="alert"><p>{text(said)}</p>'
        f"{fails if presets else ''}</div>"
    )

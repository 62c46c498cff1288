"""The Library's form for a file that was made elsewhere."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.library import Item, stored
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import done, problem
from trimtab.ui.page.upload import Upload, file_bytes
from trimtab.ui.page.visitor import Visitors


class LibraryUpload:
    """Stores a vector's or classifier's file under a name.

    Args:
        visitors: who is on the page.
        notice: where what happened is said.
    """

    def __init__(self, visitors: Visitors, notice: gr.HTML) -> None:
        self.visitors = visitors
        with gr.Accordion("Add a file", open=False, elem_id="library-add"):
            self.file = Upload(
                "A vector (.safetensors, .gguf) or a classifier (.safetensors)",
                elem_id="library-file",
                suffixes=(".safetensors", ".gguf"),
            )
            self.kind = gr.Radio(
                ["vector", "classifier"],
                value="vector",
                label="It is a",
                elem_id="library-file-kind",
            )
            self.name = gr.Textbox(
                label="Store it as",
                placeholder="a name",
                max_length=64,
                elem_id="library-file-name",
            )
            self.replaces = gr.Checkbox(
                False, label="Replace what has this name", elem_id="library-file-replaces"
            )
            self.store = gr.Button("Store", elem_id="library-store")
        self.stored = self.store.click(
            self._stored,
            [self.file.place, self.kind, self.name, self.replaces],
            [notice, self.file.place, self.name, self.replaces],
            **LIVE,
        )

    async def _stored(
        self, request: gr.Request, file: Any, kind: str, name: str, replaces: bool
    ) -> list[Any]:
        visitor = self.visitors.of(request)
        item = Item(kind, name.strip())
        try:
            data = file_bytes(file)
            path = item.path
            if not replaces and item in await stored(visitor.api):
                raise ServerError(
                    f"There is {item} already. Choose another name, or tick that it is replaced."
                )
            card = await visitor.api.put_bytes(path, data)
        except TrimtabError as error:
            return [problem(error), gr.skip(), gr.skip(), gr.skip()]
        visitor.browsing.chosen = Item(kind, card["id"])
        return [done(f"Stored {item}."), None, "", False]

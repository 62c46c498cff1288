"""The head of the page: what is served, how far it is, and the key if the server asks for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import ServerError
from trimtab.ui.page.api import ANOTHER_KEY, RefusedError
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import note, problem
from trimtab.ui.page.visitor import Visitors

_LOADING = 503
_NO_KEY = 401
_LONGEST_LOADING_S = 600


class Welcome:
    """The title, and the field for the server's key.

    Args:
        visitors: who is on the page.
    """

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors
        with gr.Row():
            self.title = gr.HTML(title_html(None), elem_id="title")
            self.another = gr.Button(
                ANOTHER_KEY, visible=False, size="sm", scale=0, min_width=110, elem_id="another-key"
            )
        self.notice = gr.HTML("", elem_id="notice")
        with gr.Row(visible=False, equal_height=True) as self.key_row:
            self.key = gr.Textbox(
                label="The server's key",
                type="password",
                elem_id="server-key",
                info="Kept while this tab is open, and sent to the server alone.",
            )
            self.enter = gr.Button("Use it", elem_id="use-key", min_width=80)
        self.entered = self.enter.click
        self.greeted = [self.title, self.notice, self.key_row, self.another]
        self.another.click(_asked, None, [self.key_row, self.key, self.another], **LIVE)

    async def greet(self, request: gr.Request, key: str) -> AsyncIterator[list[Any]]:
        """Say what is served; wait while the model loads, ask for a key where there is one."""
        visitor = self.visitors.of(request)
        if key:
            visitor.use_key(key)
        hidden, shown = gr.Row(visible=False), gr.Row(visible=True)
        no_other = gr.Button(visible=False)
        for _ in range(_LONGEST_LOADING_S):
            try:
                model = await visitor.model()
                yield [title_html(model), "", hidden, gr.Button(visible=bool(visitor.api.key))]
                return
            except RefusedError as error:
                if error.http_status == _NO_KEY:
                    said = problem(error) if key else note("This server asks for a key.")
                    yield [title_html(None), said, shown, no_other]
                    return
                if error.http_status != _LOADING:
                    yield _told(problem(error))
                    return
                yield _told(note("The model is loading…"))
            except TrimtabError as error:
                yield _told(problem(error))
                return
            await asyncio.sleep(1)
        yield _told(problem(ServerError("The model takes long to load.")))


async def _asked(request: gr.Request) -> list[Any]:
    """Show the empty field for a key in the place of the button."""
    return [gr.Row(visible=True), "", gr.Button(visible=False)]


def _told(notice: str) -> list[Any]:
    return [title_html(None), notice, gr.skip(), gr.skip()]


def title_html(model: str | None) -> str:
    """Return the head of the page."""
    served = f"<p>{escape(model)}</p>" if model else ""
    return f'<header class="tt-title"><h1>trimtab</h1>{served}</header>'

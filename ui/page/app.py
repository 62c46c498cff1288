"""The page: its tabs, its look, and the app that serves it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

# Before Gradio is imported: it would otherwise ask its makers for a newer version.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Otherwise each event, the smallest too, ends with a pandas table of all events since the start.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(2**62))

import gradio as gr
from fastapi import FastAPI

from trimtab.ui.page.api import Api
from trimtab.ui.page.bounds import Bounds
from trimtab.ui.page.build_tab import BuildTab
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.library_tab import LibraryTab
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.mount import PATH
from trimtab.ui.page.shell import Shell
from trimtab.ui.page.visitor import Visitors
from trimtab.ui.page.welcome import Welcome
from trimtab.ui.page.why_tab import WhyTab
from trimtab.ui.token_heat import style as token_heat_style

_STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
# Fonts that are there: none is fetched.
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]


def page(visitors: Visitors) -> gr.Blocks:
    """Return the page for one server.

    Args:
        visitors: who is on it; they hold the way to the server.
    """
    with gr.Blocks(title="trimtab", analytics_enabled=False, fill_width=True) as blocks:
        welcome = Welcome(visitors)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Chat", id="chat"):
                chat = ChatTab(visitors)
            with gr.Tab("Why", id="why") as why:
                WhyTab(visitors, why)
            with gr.Tab("Build", id="build") as build:
                BuildTab(visitors, tab=build, tabs=tabs, chat=chat)
            with gr.Tab("Library", id="library") as library:
                LibraryTab(visitors, tab=library, tabs=tabs, chat=chat)
        gr.on(
            [blocks.load, welcome.entered],
            welcome.greet,
            welcome.key,
            welcome.greeted,
            # A second key may come before what the first one opened has ended.
            trigger_mode="multiple",
            **LIVE,
        ).then(
            chat.open,
            None,
            chat.opened,
            **LIVE,
        )
    blocks.unload(visitors.leave)
    return blocks


def _theme() -> gr.themes.Base:
    """Return Gradio's plain theme, its texts with a contrast of 4.5 to 1 or more."""
    theme = gr.themes.Base(font=_FONT, font_mono=_MONO, primary_hue="blue", neutral_hue="slate")
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_text_color_subdued="*neutral_600",
        link_text_color_dark="*secondary_400",
    )


def page_app(api: Api) -> FastAPI:
    """Return the app that serves the page under `PATH`, and closes its connections when it ends.

    Args:
        api: the server that the page talks to.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page(Visitors(api)),
        path=PATH,
        theme=_theme(),
        css=_STYLE + token_heat_style(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        # Gradio's own schema would list every button as an API.
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def closing(within: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(within) as state:
            try:
                yield state
            finally:
                await api.close()

    app.router.lifespan_context = closing
    app.add_middleware(Bounds)
    app.add_middleware(Shell)
    return app

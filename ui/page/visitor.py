"""Who is on the page: each browser tab's own key, chat and run, held apart from all others."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import gradio as gr

from trimtab.ui.page.api import Api
from trimtab.ui.page.build_watch import Watching
from trimtab.ui.page.conversation import Conversation
from trimtab.ui.page.library import Browsing
from trimtab.ui.page.why_run import Explaining

MAX_VISITORS = 1000


@dataclass
class Visitor:
    """One open tab of a browser.

    Attributes:
        api: the server, under the visitor's own key.
        chat: what was said to the model and answered, on both sides.
        explaining: what attributes an answer.
        watching: the build whose progress is shown.
        browsing: what the Library shows.
    """

    api: Api
    chat: Conversation = field(default_factory=Conversation)
    explaining: Explaining = field(default_factory=Explaining)
    watching: Watching = field(default_factory=Watching)
    browsing: Browsing = field(default_factory=Browsing)
    _model: str | None = None

    async def model(self) -> str:
        """Return the served model's name.

        Raises:
            ServerError: the server cannot be asked.
        """
        if self._model is None:
            self._model = str((await self.api.get("/v1/models"))["data"][0]["id"])
        return self._model

    def stop(self) -> None:
        """End whatever runs for this visitor."""
        # A press whose steering is being checked would begin to answer after this.
        self.chat.is_over = True
        for running in (self.chat, self.explaining, self.watching):
            running.stop()

    def use_key(self, key: str) -> None:
        """Talk to the server under another key."""
        self.api = self.api.with_key(key or None)
        self._model = None


class Visitors:
    """All open tabs. The longest unseen is forgotten when there are too many.

    Args:
        api: the server; a visitor's own key takes the place of its key.
    """

    def __init__(self, api: Api) -> None:
        self.api = api
        self._known: OrderedDict[str, Visitor] = OrderedDict()

    def of(self, request: gr.Request) -> Visitor:
        """Return the visitor that a Gradio request comes from.

        Args:
            request: Gradio's, whose session hash is drawn at random by the browser's tab.
        """
        name = request.session_hash or ""
        visitor = self._known.pop(name, None) or Visitor(self.api)
        self._known[name] = visitor
        while len(self._known) > MAX_VISITORS:
            _, oldest = self._known.popitem(last=False)
            oldest.stop()
        return visitor

    async def leave(self, request: gr.Request) -> None:
        """Forget a visitor whose tab was closed, and end what runs for it.

        Not a plain function: Gradio would call that in a thread, where no task can be ended.
        """
        visitor = self._known.pop(request.session_hash or "", None)
        if visitor is not None:
            visitor.stop()

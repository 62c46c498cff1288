"""Watching one build on the server, until it is over or another is watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from trimtab.ui.page.api import Api

PATH = "/v1/steering/builds"
_EVERY_S = 0.5


class Watching:
    """Which build a visitor watches: one at a time.

    The build itself is the server's, and goes on when nobody watches.

    Attributes:
        build: the id of the one that was watched last.
        starting: held while one is asked for.
    """

    def __init__(self) -> None:
        self.build: str | None = None
        self.starting = asyncio.Lock()
        self._turn: object | None = None

    def stop(self) -> None:
        """Watch none."""
        self._turn = None

    async def watch(self, api: Api, build: str) -> AsyncIterator[dict[str, Any]]:
        """Yield a build's state, twice a second, the last when it is over.

        Ends without that when another is watched.

        Args:
            api: the server, under the visitor's key.
            build: its id.

        Raises:
            ServerError: the server cannot be asked, or has forgotten it.
        """
        turn = self._turn = object()
        self.build = build
        while True:
            state = await api.get(build_path(build))
            if self._turn is not turn:
                return
            yield state
            if not is_under_way(state):
                return
            await asyncio.sleep(_EVERY_S)
            if self._turn is not turn:
                return


def build_path(build: str) -> str:
    """Return a build's place in the server's API."""
    return f"{PATH}/{quote(build, safe='')}"


def is_under_way(state: dict[str, Any]) -> bool:
    """Return whether a build waits or runs."""
    return state["status"] in ("queued", "running")

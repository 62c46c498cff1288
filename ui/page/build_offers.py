"""What the server offers to build from, and by which methods."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from trimtab.ui.page.api import Api

Cards = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Offers:
    """Cards by id: bundled pairs, bundled sets of labelled examples, and methods."""

    concepts: Cards
    sets: Cards
    methods: Cards

    @property
    def default_method(self) -> str | None:
        """The method that the server takes when none is named."""
        return next((name for name, card in self.methods.items() if card["is_default"]), None)


async def offers(api: Api) -> Offers:
    """Ask the server.

    Raises:
        ServerError: it cannot be asked.
    """
    bundled, methods = await asyncio.gather(
        api.get("/v1/steering/concepts"), api.get("/v1/steering/methods")
    )
    return Offers(
        {card["id"]: card for card in bundled["data"] if card["kind"] == "vector"},
        {card["id"]: card for card in bundled["data"] if card["kind"] == "classifier"},
        {card["id"]: card for card in methods["data"]},
    )

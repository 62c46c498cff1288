"""What a stored thing sets in the chat, and what its end takes out of the chat's panel."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.ui.page.api import Api
from trimtab.ui.page.catalogue import catalogue
from trimtab.ui.page.chat_tab import offering
from trimtab.ui.page.library import Item
from trimtab.ui.page.notice import note


async def try_in_chat(api: Api, item: Item, card: dict[str, Any]) -> list[Any]:
    """Return the values that show in the chat what something does.

    Args:
        api: the server, under the visitor's key.
        item: what is to be tried.
        card: what the API tells of it.

    Returns:
        Those of the asking tab's notice, the chat's `offered`, its notice and the tabs.

    Raises:
        ServerError: the server cannot be asked.
    """
    offered = offering(await catalogue(api), settings=chat_settings(item, card))
    said = note(f"What {item} does is set beside the chat. Send a prompt to see it.")
    return ["", *offered, said, gr.Tabs(selected="chat")]


def chat_settings(item: Item, card: dict[str, Any]) -> dict[str, Any]:
    """Return the panel's settings that show what something does.

    A vector steers at scale 1. A classifier guides at its first calibrated dose, and reads; one
    without a dose only reads.

    Args:
        item: what is to be tried.
        card: what the API tells of it.
    """
    if item.kind == "vector":
        return {"vectors": [{"id": item.id, "scale": 1.0}]}
    if item.kind == "preset":
        return {"preset": item.id}
    # The panel steers by steps toward or away from labels that it names.
    doses = [dose for dose in card["doses"] if not (dose["picks_rival"] or dose["is_reflection"])]
    if not doses:
        return {"probes": [item.id]}
    guide = {"classifier": item.id, "target": doses[0]["target"], "avoid": doses[0]["avoid"]}
    return {"guidance": [{**guide, "scale": 1.0}], "probes": [item.id]}


def without(settings: dict[str, Any], item: Item) -> dict[str, Any]:
    """Return the panel's settings without what is no longer stored.

    Args:
        settings: the panel's value.
        item: what was deleted.
    """
    left = dict(settings)
    if item.kind == "preset":
        return {**left, "preset": None} if left.get("preset") == item.id else left
    left["probes"] = [name for name in left.get("probes") or () if name != item.id]
    if item.kind == "vector":
        left["vectors"] = [term for term in left.get("vectors") or () if term["id"] != item.id]
        left["ablate"] = [name for name in left.get("ablate") or () if name != item.id]
    else:
        terms = left.get("guidance") or ()
        left["guidance"] = [term for term in terms if term["classifier"] != item.id]
    gate = left.get("when")
    if gate:
        name, _, label = gate["probe"].partition("/")
        if name == item.id and bool(label) == (item.kind == "classifier"):
            left["when"] = None
    return left

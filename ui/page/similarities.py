"""The Library's comparison of vectors: how alike they are, at which layer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.library import Library
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import problem
from trimtab.ui.page.similarity_view import similarity_html
from trimtab.ui.page.visitor import Visitor, Visitors

OWN = "own"
_MOST = 256  # the API compares no more at once


class Similarities:
    """The choice of a layer, and the table. Hidden where there are no vectors to compare.

    Args:
        visitors: who is on the page.
    """

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors
        with gr.Column(visible=False, elem_id="library-similarities") as self.box:
            gr.HTML("<h2>How alike the vectors are</h2>")
            self.layer = gr.Dropdown(
                [("each vector's own layers", OWN)],
                value=OWN,
                label="Compared at",
                elem_id="library-layer",
            )
            self.table = gr.HTML("", elem_id="library-matrix")
        self.layer.input(
            self._compared,
            self.layer,
            self.table,
            trigger_mode="always_last",
            **LIVE,
        )

    @property
    def shown(self) -> list[Any]:
        """What `show` sets."""
        return [self.box, self.layer, self.table]

    async def show(self, visitor: Visitor, kind: str, layer: str) -> list[Any]:
        """Return the values of `shown`.

        Args:
            visitor: whose library it is.
            kind: what is listed; only vectors are compared.
            layer: `OWN`, or a layer's number.
        """
        library = visitor.browsing.library
        if kind != "vector" or library is None or len(library.cards["vector"]) < 2:
            return [gr.Column(visible=False), gr.skip(), gr.skip()]
        layers = _layers(library)
        if layer not in layers:
            layer = OWN
        names = {OWN: "each vector's own layers", **{n: f"layer {n}" for n in layers}}
        choices = gr.Dropdown(choices=[(name, n) for n, name in names.items()], value=layer)
        return [gr.Column(visible=True), choices, await _table(visitor, layer)]

    async def _compared(self, request: gr.Request, layer: str) -> str:
        return await _table(self.visitors.of(request), layer)


async def _table(visitor: Visitor, layer: str) -> str:
    library, chosen = visitor.browsing.library, visitor.browsing.chosen
    if library is None:
        return ""
    name = chosen.id if chosen is not None and chosen.kind == "vector" else None
    query: dict[str, Any] = {} if layer == OWN else {"layer": layer}
    ids = list(library.cards["vector"])
    if len(ids) > _MOST:
        first = [one for one in ids if one != name][: _MOST - 1]
        query["ids"] = ",".join(sorted([*first, *([name] if name else [])]))
    try:
        answer = await visitor.api.get("/v1/steering/similarities", **query)
    except TrimtabError as error:
        return problem(error)
    return similarity_html(answer, name)


def _layers(library: Library) -> list[str]:
    cards = library.cards["vector"].values()
    return [str(layer) for layer in sorted({layer for card in cards for layer in card["layers"]})]

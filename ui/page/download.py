"""Files for the visitor's own disk. None is written on the server, so none is there to be found."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import gradio as gr

from trimtab.ui.page.live import LIVE

_SCRIPT = (Path(__file__).parent / "download.js").read_text(encoding="utf-8")


class Download:
    """An invisible component: the browser saves what is put there under the name it comes with.

    Wire a button to a handler that returns `file_value(...)` for `place`, and give the event to
    `forget`, so that the bytes do not stay in the visitor's session:

        download.forget(button.click(handler, chosen, [download.place, notice]))

    Args:
        elem_id: of the component.
    """

    def __init__(self, *, elem_id: str) -> None:
        self.place = gr.HTML(
            None, html_template="", js_on_load=_SCRIPT, visible="hidden", elem_id=elem_id
        )

    def forget(self, event: Any) -> None:
        """Empty the place once an event has filled it.

        Args:
            event: what a Gradio listener returns.
        """
        event.then(
            lambda: None,
            None,
            self.place,
            **LIVE,
        )


def file_value(name: str, data: bytes) -> dict[str, str]:
    """Return a file as the value of a `Download`'s place.

    Args:
        name: what the file is called.
        data: all of it, at most `api.MAX_FILE_BYTES`.
    """
    return {"name": name, "data": base64.b64encode(data).decode()}

"""A file from the visitor's disk, kept by the browser until a button sends it. None is written."""

from __future__ import annotations

import base64
import binascii
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.api import MAX_FILE_BYTES

_SCRIPT = (Path(__file__).parent / "upload.js").read_text(encoding="utf-8")


class UploadError(TrimtabError):
    """A file that did not come through."""

    code = "invalid_upload"


class Upload:
    """A field for one file. Its `place` is an event's input, and is emptied by None as its output.

    Args:
        label: what the file is.
        elem_id: of the component.
        suffixes: what the browser offers first, such as `.gguf`.
        most: bytes that it may have.
    """

    def __init__(
        self, label: str, *, elem_id: str, suffixes: tuple[str, ...], most: int = MAX_FILE_BYTES
    ) -> None:
        self.place = gr.HTML(
            None,
            html_template=(
                f'<label class="tt-file"><span>{escape(label)}</span>'
                f'<input type="file" accept="{",".join(suffixes)}"></label>'
                '<p class="tt-hint" role="status"></p>'
            ),
            js_on_load=_SCRIPT,
            most=most,
            elem_id=elem_id,
        )


def file_bytes(value: Any) -> bytes:
    """Return the file in an `Upload`'s place.

    Raises:
        UploadError: there is none, it is longer than `MAX_FILE_BYTES`, or it came broken.
    """
    if not value:
        raise UploadError("Choose a file first.")
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, str):
        raise UploadError("The file did not come through; choose it again.")
    if len(data) > 4 * (MAX_FILE_BYTES // 3 + 1):
        raise UploadError(
            f"The file is longer than the {MAX_FILE_BYTES // 2**20} MiB that the page passes on. "
            "Send it to the API yourself."
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UploadError("The file did not come through; choose it again.") from None

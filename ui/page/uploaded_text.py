"""An uploaded file of examples as the text that a field shows."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.pasted import MAX_CHARS
from trimtab.ui.page.upload import UploadError, file_bytes


def uploaded_text(value: Any) -> str:
    """Return the text of the file in an `Upload`'s place.

    Raises:
        UploadError: there is none, it is empty or too long for the page, or no text.
    """
    data = file_bytes(value)
    if not data.strip():
        raise UploadError("The file is empty; choose another.")
    if len(data) > MAX_CHARS:
        raise UploadError(
            f"The file is longer than the {MAX_CHARS // 2**20} MiB that the page takes. Build from "
            "it with the command line: `trimtab vectors build --pairs` or `trimtab classifiers "
            "train --texts`."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UploadError(
            "The file is not text in UTF-8. Save it as UTF-8 and try again."
        ) from None

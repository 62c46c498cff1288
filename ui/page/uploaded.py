"""A file that somebody uploaded: read once, and deleted."""

from __future__ import annotations

from pathlib import Path

from trimtab.steering.errors import DataError
from trimtab.ui.page.pasted import MAX_CHARS


def read_upload(path: str) -> str:
    """Return an uploaded file's text and delete the file, whatever becomes of it.

    Args:
        path: where Gradio has put it.

    Raises:
        DataError: it is too long, or no text.
    """
    file = Path(path)
    try:
        # UTF-8 takes at most four bytes a character.
        if file.stat().st_size > 4 * MAX_CHARS:
            raise DataError(_too_long())
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            "The file is not text in UTF-8. Save it as UTF-8, a JSON object a line."
        ) from None
    finally:
        file.unlink(missing_ok=True)
    if len(text) > MAX_CHARS:
        raise DataError(_too_long())
    return text


def _too_long() -> str:
    return (
        f"The file is longer than {MAX_CHARS} characters, which is what the page takes. Build from "
        "it with the command line: `trimtab vectors build --pairs` or `trimtab classifiers train "
        "--texts`."
    )

"""Every error trimtab raises on purpose.

A message says what failed, the value, what is allowed and what to do next. `param` is the JSON
path of the offending request field, `status` the HTTP status it becomes, `code` a stable word for
programs. The CLI prints the message alone; the server puts it in OpenAI's error body.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of all errors meant for the user.

    Args:
        message: one or two full sentences.
        param: JSON path of the field at fault, such as `steering.vectors[0].scale`.
    """

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class SpecError(TrimtabError):
    """A steering spec that cannot be read or compiled."""

    code = "invalid_steering"


class DoseError(SpecError):
    """A spec whose relative dose is over the server's limit."""

    code = "dose_over_limit"


class NotFoundError(TrimtabError):
    """A named vector, preset or model that does not exist."""

    status = 404
    code = "not_found"


class ArtifactError(TrimtabError):
    """A file that is not a whole, known trimtab artifact, or belongs to another model."""

    code = "invalid_artifact"


class ModelLoadError(TrimtabError):
    """A model that cannot be found, read or steered."""

    status = 500
    code = "model_load_failed"


class DataError(TrimtabError):
    """Training data that cannot be used."""

    code = "invalid_data"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(words: Iterable[str], *, most: int = 12) -> str:
    """Return the words sorted and joined for a message, cut after `most`."""
    ordered = sorted(words)
    shown = ", ".join(ordered[:most]) or "none"
    return shown if len(ordered) <= most else f"{shown} and {len(ordered) - most} more"

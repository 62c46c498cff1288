"""A request's `metadata`: labels of the sender's, without effect on the answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trimtab.serving.errors import RequestError

# OpenAI's own limits.
MAX_PAIRS = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512


def _checked(value: Any) -> Any:
    if not isinstance(value, dict):
        raise RequestError("metadata must be an object of strings.", param="metadata")
    if len(value) > MAX_PAIRS:
        raise RequestError(
            f"metadata has {len(value)} pairs; at most {MAX_PAIRS} are allowed.", param="metadata"
        )
    for key, label in value.items():
        if len(key) > MAX_KEY_CHARS:
            raise RequestError(
                f"metadata has a key of {len(key)} characters, {key[:40]!r}...; at most "
                f"{MAX_KEY_CHARS} are allowed.",
                param="metadata",
            )
        param = f"metadata.{key}"
        if not isinstance(label, str):
            raise RequestError(f"{param} must be a string.", param=param)
        if len(label) > MAX_VALUE_CHARS:
            raise RequestError(
                f"{param} has {len(label)} characters; at most {MAX_VALUE_CHARS} are allowed.",
                param=param,
            )
    return value


Metadata = Annotated[
    dict[str, str],
    BeforeValidator(_checked),
    Field(
        max_length=MAX_PAIRS,
        description=f"The sender's labels: keys of at most {MAX_KEY_CHARS} characters, "
        f"values of at most {MAX_VALUE_CHARS}",
    ),
]

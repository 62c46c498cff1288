"""A run's settings to copy: as JSON, as curl, and as Python with OpenAI's client."""

from __future__ import annotations

import json
import shlex
from typing import Any

_OPENAI_FIELDS = ("model", "messages", "max_tokens", "temperature", "seed")


def request_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a run's steered request as one sends it by hand."""
    return {name: value for name, value in body.items() if name not in ("stream", "logprobs")}


def as_json(body: dict[str, Any]) -> str:
    """Return the body of POST /v1/chat/completions."""
    return json.dumps(body, indent=2, ensure_ascii=False)


def as_curl(body: dict[str, Any], *, url: str, has_key: bool) -> str:
    """Return one command for a shell. The key itself never stands in it."""
    key = " \\\n  -H 'authorization: Bearer YOUR_KEY'" if has_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return (
        f"curl {url}/v1/chat/completions \\\n  -H 'content-type: application/json'{key} \\\n"
        f"  -d {data}"
    )


def as_python(body: dict[str, Any], *, url: str, has_key: bool) -> str:
    """Return a program with OpenAI's client; our own fields go through its `extra_body`."""
    key = '"YOUR_KEY"' if has_key else '"none"'
    own = {name: value for name, value in body.items() if name in _OPENAI_FIELDS}
    extra = {name: value for name, value in body.items() if name not in _OPENAI_FIELDS}
    if extra:
        own["extra_body"] = extra
    lines = [f"    {name}={_python(value)}," for name, value in own.items()]
    return "\n".join(
        [
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{url}/v1", api_key={key})',
            "answer = client.chat.completions.create(",
            *lines,
            ")",
            "print(answer.choices[0].message.content)",
        ]
    )


def _python(value: Any) -> str:
    return repr(value)

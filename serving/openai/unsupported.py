"""The fields of OpenAI's API that trimtab refuses by name, or takes with one value only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.serving.errors import RequestError
from trimtab.steering.errors import did_you_mean, listed

# Taken and without effect on the answer: they label a request for its sender. Only `metadata` is
# kept, in the generation log.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")

# The only values that mean what trimtab does anyway.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "function_call": ("none",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
}

# Everything else OpenAI's API or vLLM's knows and trimtab does not do, with what to do instead.
REFUSED: Mapping[str, str] = {
    "audio": "",
    "chat_template": "The model's own template is used.",
    "chat_template_kwargs": "The model's own template is used as it is.",
    "echo": "It belongs to /v1/completions.",
    "guided_json": "",
    "guided_regex": "",
    "guided_choice": "",
    "length_penalty": "",
    "moderation": "",
    "prediction": "",
    "prompt_cache_options": "",
    "prompt_cache_retention": "",
    "reasoning_effort": "",
    "structured_outputs": "",
    "suffix": "",
    "top_logprobs": "Send `logprobs` as a number.",
    "use_beam_search": "",
    "verbosity": "",
    "web_search_options": "",
}


def refuse_unsupported(body: Mapping[str, Any], *, honoured: frozenset[str]) -> dict[str, Any]:
    """Return the fields to honour, without nulls (null means absent) and fields without effect.

    Args:
        body: the request's JSON object.
        honoured: names the route's model has; they pass through, as do unknown ones, which the
            model then refuses with the nearest known name.

    Raises:
        RequestError: naming the first field trimtab does not support.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in honoured:
            kept[name] = value
        elif name == "best_of":
            # As many candidates as answers: nothing to choose from, so nothing to do.
            _check_only(name, value, (1 if body.get("n") is None else body["n"],))
        elif name in ONLY:
            _check_only(name, value, ONLY[name])
        elif name in REFUSED:
            hint = REFUSED[name]
            raise RequestError(
                f"trimtab does not support `{name}`; leave it out.{' ' + hint if hint else ''}",
                param=name,
                code="unsupported_field",
            )
        else:
            kept[name] = value
    return kept


def _check_only(name: str, value: Any, only: tuple[Any, ...]) -> None:
    # By type too, because in Python 1 == True and 0 == False.
    if any(type(value) is type(allowed) and value == allowed for allowed in only):
        return
    words = " or ".join(json.dumps(x)[:40] for x in only)
    raise RequestError(
        f"trimtab does not support `{name}` with this value; leave it out (or send {words}).",
        param=name,
        code="unsupported_field",
    )


def refuse_unknown(body: Mapping[str, Any], *, known: tuple[str, ...]) -> None:
    """Refuse a small body's unknown fields.

    Raises:
        RequestError: naming the first, and the nearest known one.
    """
    for name in body:
        if name not in known:
            raise RequestError(
                f"{name[:80]} is not a known field.{did_you_mean(name[:80], known)} "
                f"Known: {listed(known)}.",
                param=name[:80],
                code="unknown_field",
            )

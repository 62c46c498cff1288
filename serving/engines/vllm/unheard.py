"""What a client of vLLM's own server may say that vLLM would drop without a word: refused.

vLLM ignores fields it does not know, its beams lose `vllm_xargs`, and some routes never had it.
Each would be a 200 with unsteered text for somebody who asked for steering.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY, PRESET
from trimtab.serving.errors import error_response
from trimtab.steering.errors import SpecError, TrimtabError

# Ends of the paths of routes that hand `vllm_xargs` on; /invocations is one of the others in turn.
_HEARING = ("/completions", "/batch", "/render", "/responses", "/messages", "/invocations")
_OURS = {
    "steering": f"send vllm_xargs.{ASKED}, a string that holds the same",
    "probes": "`trimtab serve --engine vllm` reads them",
}


def asks(extra_args: Mapping[str, Any]) -> bool:
    """Return whether a request's `vllm_xargs` ask for steering.

    Raises:
        SpecError: they hold one of our inner keys.
    """
    for name in extra_args:
        if name.startswith(KEY):
            raise SpecError(
                f"vllm_xargs.{name[:80]} is not for clients; say what you want in "
                f"vllm_xargs.{ASKED}.",
                param=f"vllm_xargs.{name[:80]}",
            )
    return ASKED in extra_args or PRESET in extra_args


def refusal(error: TrimtabError) -> Exception:
    """Return what vLLM answers with 400 and the JSON path, or with 500 for a fault of ours."""
    if error.status >= 500:
        from trimtab.serving.engines.vllm.plain_answers import server_error

        return server_error(error.message)
    from vllm.exceptions import VLLMValidationError

    refused: Exception = VLLMValidationError(error.message, parameter=error.param)
    return refused


class Listener:
    """ASGI middleware that reads bodies for what their route would not hear.

    Args:
        app: the app inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_json_post(scope):
            await self.app(scope, receive, send)
            return
        messages, body = await _read(receive)
        try:
            _check(scope["path"], body)
        except TrimtabError as error:
            await error_response(error)(scope, receive, send)
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)


def _is_json_post(scope: Scope) -> bool:
    kind = Headers(scope=scope).get("content-type", "")
    # Ours checks its own bodies.
    return scope["method"] == "POST" and "json" in kind and "/v1/steering/" not in scope["path"]


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages, b"".join(message.get("body", b"") for message in messages)


def _check(path: str, body: bytes) -> None:
    if not any(name.encode() in body for name in (*_OURS, PRESET, KEY)):
        return
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return  # vLLM says what is wrong with it
    if not isinstance(read, dict):
        return
    _refuse_own_fields(read)
    xargs = read.get("vllm_xargs")
    if isinstance(xargs, dict) and asks(xargs) and not _hears(path):
        raise SpecError(
            f"{path[:200]} does not read vllm_xargs, so it cannot steer; /v1/chat/completions and "
            "/v1/completions do.",
            param=f"vllm_xargs.{ASKED}",
        )


def _hears(path: str) -> bool:
    if path.endswith("/messages"):
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        return "vllm_xargs" in AnthropicMessagesRequest.model_fields  # not yet in 0.26
    return path.endswith(_HEARING)


def _refuse_own_fields(body: Mapping[str, Any]) -> None:
    for name, mend in _OURS.items():
        if body.get(name) is not None:
            raise SpecError(f"vLLM's own server does not know {name}: {mend}.", param=name)


# --- without the middleware, which vLLM puts in place only if VLLM_PLUGINS names trimtab


@functools.cache
def guard_bodies() -> None:
    """Refuse the same where vLLM's most used routes read their bodies."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _guard_method(body, "to_sampling_params", _refuse_unknown)
    for body in (ChatCompletionRequest, CompletionRequest):
        _guard_method(body, "to_beam_search_params", _refuse_beams)


def _guard_method(owner: Any, name: str, check: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def checked(body: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check(body)
        except TrimtabError as error:
            raise refusal(error) from None
        return original(body, *args, **kwargs)

    setattr(owner, name, checked)


def _refuse_unknown(body: Any) -> None:
    _refuse_own_fields(body.model_extra or {})


def _refuse_beams(body: Any) -> None:
    _refuse_unknown(body)
    if body.vllm_xargs and asks(body.vllm_xargs):
        raise SpecError(
            "Beam search cannot be steered: vLLM does not hand vllm_xargs on to its beams.",
            param="use_beam_search",
        )

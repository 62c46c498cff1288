"""Steering for vLLM's own server: `vllm_xargs.steering` is compiled before the engine sees it.

Every route that generates ends in `AsyncLLM.add_request`, so the guard stands there. What a client
can say without ever getting there (a field that vLLM ignores, a way of decoding that drops
`vllm_xargs`) is refused where a route reads its body.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import copy
from typing import Any

from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY, PRESET, PackedRequest
from trimtab.steering.errors import SpecError, TrimtabError


def guard_requests(*, is_on: bool) -> None:
    """Watch every request that any route of vLLM's server, or its `LLM` class, adds to the engine.

    Args:
        is_on: compile what they ask for; else refuse those that ask.

    Raises:
        ModelLoadError: a variable of the environment is not what it must be.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if is_on:
        from trimtab.serving.engines.vllm.plain_steering import environment_settings

        environment_settings()
    _guard_server(AsyncLLM, is_on=is_on)
    _guard_offline(LLMEngine)


def _guard_server(owner: Any, *, is_on: bool) -> None:
    original, make = owner.add_request, owner.__init__

    @functools.wraps(original)
    async def add_request(
        llm: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None)
        # Whoever brings a whole request to the engine has its parameters in there.
        if not extra:
            extra = getattr(getattr(prompt, "sampling_params", None), "extra_args", None)
        if not extra or isinstance(extra.get(KEY), PackedRequest):
            return await original(llm, request_id, prompt, params, *args, **kwargs)
        try:
            if not asks(extra):
                return await original(llm, request_id, prompt, params, *args, **kwargs)
            if not is_on:
                raise SpecError(
                    "This server runs with TRIMTAB_VLLM=off and does not steer.",
                    param=f"vllm_xargs.{ASKED}",
                )
            if hasattr(prompt, "__anext__") or hasattr(prompt, "sampling_params"):
                raise SpecError(
                    "A prompt that comes in pieces cannot be steered.", param=f"vllm_xargs.{ASKED}"
                )
            return await _added(original, llm, request_id, prompt, params, *args, **kwargs)
        except TrimtabError as error:
            raise refusal(error) from error

    @functools.wraps(make)
    def init(llm: Any, *args: Any, **kwargs: Any) -> None:
        make(llm, *args, **kwargs)
        _guard_bodies()

    owner.add_request = add_request
    owner.__init__ = init


async def _added(
    original: Any, llm: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    from trimtab.serving.engines.vllm.plain_answers import TICKET, ticket_for
    from trimtab.serving.engines.vllm.plain_steering import steering_of

    steering = steering_of(llm)
    asked = await steering.asked(params.extra_args)
    packed = await steering.packed(asked)
    with ticket_for(asked) as ticket:
        others = {k: v for k, v in params.extra_args.items() if k not in (ASKED, PRESET)}
        params = copy(params)  # the client's own may be used again
        params.extra_args = {**others, **packed, TICKET: ticket}
        if asked.plan.needs_whole_prompt:
            params.skip_reading_prefix_cache = True
        return await original(llm, request_id, prompt, params, *args, **kwargs)


def asks(extra_args: Mapping[str, Any]) -> bool:
    """Return whether a request asks for steering.

    Raises:
        SpecError: it holds one of our inner keys.
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


def _guard_offline(owner: Any) -> None:
    original = owner.add_request

    @functools.wraps(original)
    def add_request(
        engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if not isinstance(extra.get(KEY), PackedRequest) and asks(extra):
            raise SpecError(
                "vLLM's LLM class cannot steer; serve the model with `vllm serve`, or with "
                "`trimtab serve`.",
                param=f"extra_args.{ASKED}",
            )
        return original(engine, request_id, prompt, params, *args, **kwargs)

    owner.add_request = add_request


# --- what would never reach the engine


@functools.cache
def _guard_bodies() -> None:
    """Refuse bodies whose wish for steering vLLM would drop without a word."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _guard_method(body, "to_sampling_params", _refuse_own_field)
    for body in (ChatCompletionRequest, CompletionRequest):
        _guard_method(body, "to_beam_search_params", _refuse_beams)


def _guard_method(owner: Any, name: str, check: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def checked(body: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check(body)
        except TrimtabError as error:
            raise refusal(error) from error
        return original(body, *args, **kwargs)

    setattr(owner, name, checked)


def _refuse_own_field(body: Any) -> None:
    for name in ("steering", "probes"):
        if (body.model_extra or {}).get(name) is not None:
            raise SpecError(
                f"vLLM's own server does not know {name}; "
                + (
                    "send vllm_xargs.steering, a string that holds the same."
                    if name == "steering"
                    else "`trimtab serve --engine vllm` does."
                ),
                param=name,
            )


def _refuse_beams(body: Any) -> None:
    _refuse_own_field(body)
    if body.vllm_xargs and asks(body.vllm_xargs):
        raise SpecError(
            "Beam search cannot be steered: vLLM does not hand vllm_xargs on to its beams.",
            param="use_beam_search",
        )

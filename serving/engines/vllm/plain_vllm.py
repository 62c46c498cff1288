"""Steering for vLLM's own server: `vllm_xargs.steering` is compiled before the engine sees it.

Every route that generates ends in `AsyncLLM.add_request`, so the guard stands there. What would be
lost on the way to it is refused in `unheard.py`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from copy import copy
from typing import Any

from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY, PRESET, PackedRequest
from trimtab.serving.engines.vllm.reports import failure_on_any
from trimtab.serving.engines.vllm.unheard import asks, guard_bodies, refusal
from trimtab.steering.errors import SpecError, TrimtabError


def guard_requests(*, is_on: bool) -> None:
    """Watch every request that any route of vLLM's server, or its `LLM` class, adds to the engine.

    Args:
        is_on: compile what they ask for; else refuse those that ask.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    _guard_server(AsyncLLM, is_on=is_on)
    _guard_offline(LLMEngine)


def _guard_server(owner: Any, *, is_on: bool) -> None:
    original, make, answers = owner.add_request, owner.__init__, owner.generate

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
                    "A prompt that comes in pieces, or made into the engine's own request, cannot "
                    "be steered.",
                    param=f"vllm_xargs.{ASKED}",
                )
            return await _added(original, llm, request_id, prompt, params, *args, **kwargs)
        except TrimtabError as error:
            raise refusal(error) from None

    @functools.wraps(make)
    def init(llm: Any, *args: Any, **kwargs: Any) -> None:
        if is_on:
            from trimtab.serving.engines.vllm.plain_steering import environment_settings

            environment_settings()  # a wrong variable is known now, not at the first request
        make(llm, *args, **kwargs)
        guard_bodies()

    @functools.wraps(answers)
    def generate(llm: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = answers(llm, prompt, *args, **kwargs)
        given = dict(zip(("sampling_params", "request_id"), args, strict=False)) | kwargs
        extra = getattr(given["sampling_params"], "extra_args", None)
        if not extra or not {ASKED, PRESET} & set(extra):
            return outputs  # or what only the guard above may see
        return _vouched(llm, outputs, given["request_id"])

    owner.generate = generate
    owner.add_request = add_request
    owner.__init__ = init


async def _vouched(llm: Any, outputs: Any, request_id: str) -> AsyncIterator[Any]:
    """Let a steered answer's last output go only if no worker gave up on it."""
    from trimtab.serving.engines.vllm.plain_answers import server_error
    from trimtab.serving.engines.vllm.plain_steering import steering_of

    try:
        async for output in outputs:
            if output.finished:
                served = await steering_of(llm).served()
                why = await failure_on_any(llm, request_id, n_workers=served.n_workers)
                if why is not None:
                    raise server_error(f"The steering of this request failed: {why}.")
            yield output
    finally:
        await outputs.aclose()  # which aborts it, if it has not ended


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

"""Steering for vLLM's own server: `vllm_xargs.steering` is compiled before the engine sees it."""

from __future__ import annotations

from typing import Any

from trimtab.serving.engines.vllm.plan_wire import ASKED


def guard_requests(*, is_on: bool) -> None:
    """Watch every request that any route of vLLM's server adds to the engine."""
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.add_request

    async def add_request(
        engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked = (getattr(params, "extra_args", None) or {}).get(ASKED)
        if asked is not None:
            raise ValueError("vllm_xargs.steering: not supported yet")
        return await original(engine, request_id, prompt, params, *args, **kwargs)

    AsyncLLM.add_request = add_request

"""From a validated request to queued sequences, and from those to an HTTP answer."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.engines.base import Request
from trimtab.serving.event_stream import EventStream, as_json
from trimtab.serving.generation import Generation, or_gone
from trimtab.serving.openai.answer import Answer
from trimtab.serving.openai.generation_request import GenerationRequest
from trimtab.serving.request_plan import preset_of, probe_readers, request_plan
from trimtab.serving.state import ServerState
from trimtab.steering.plan import Plan, Reader


@dataclass(frozen=True)
class Admitted:
    """What a request's steering and probes come to.

    Attributes:
        plan: compiled steering, or None.
        probes: what reads its probes.
    """

    plan: Plan | None
    probes: tuple[Reader, ...]


async def admit(server: ServerState, request: GenerationRequest, *, vocab_size: int) -> Admitted:
    """Check a request against the server's limits, compile its steering and find its probes.

    Raises:
        TrimtabError: with the JSON path of what is at fault.
    """
    settings = server.settings
    has_preset = preset_of(server, request.model) is not None
    request.within(max_n=settings.max_n, max_stop=settings.max_stop, vocab_size=vocab_size)
    is_steered = has_preset or request.steering is not None or request.vllm_xargs is not None

    def looked_up() -> Admitted:
        plan = None
        if is_steered:
            plan = request_plan(
                server, model=request.model, steering=request.steering, xargs=request.vllm_xargs
            )
        return Admitted(plan, probe_readers(server, request.probes))

    if not is_steered and not request.probes:
        return Admitted(None, ())
    # In a thread, because the store looks at its files.
    return await run_in_threadpool(looked_up)


def sequences(
    server: ServerState,
    request: GenerationRequest,
    *,
    prompts: list[tuple[int, ...]],
    admitted: Admitted,
    wanted_tokens: int | None,
    vocab_size: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> list[Request]:
    """Return one engine request a choice, all choices of the first prompt first.

    Ids are our own, never the client's, so that no client can touch another's request.

    Args:
        wanted_tokens: most tokens to generate; None takes what the context has left.
    """
    made = []
    for ids in prompts:
        room = max(1, server.info.max_context - len(ids))
        for choice in range(request.n):
            sampling = request.sampling(
                max_tokens=room if wanted_tokens is None else wanted_tokens,
                choice=choice,
                vocab_size=vocab_size,
                logprobs=logprobs,
                # The choices of one prompt share its log-probabilities; each gets them, so that
                # every choice is the same shape.
                prompt_logprobs=prompt_logprobs,
            )
            made.append(
                Request(
                    uuid.uuid4().hex,
                    ids,
                    sampling,
                    admitted.plan,
                    admitted.probes,
                    request.cache_salt,
                )
            )
    return made


async def answered(
    http: HttpRequest,
    server: ServerState,
    *,
    requests: list[Request],
    answer: Answer,
    close: Callable[[], None] | None = None,
) -> Response:
    """Run the sequences and return the answer, streamed if it was asked for so.

    A stream begins when its first token is there: what fails before has a status of its own.

    Args:
        close: called once the answer is sent or lost.

    Raises:
        TrimtabError: refused, failed or timed out before anything was sent.
    """
    generation = None
    handed_over = False

    async def end() -> None:
        if generation is not None:
            await generation.close()
        if close is not None:
            close()

    try:
        watch = None
        if server.generation_log is not None:
            watch = server.generation_log.recorder(answer.n_choices, facts=answer.logged_facts)
        generation = Generation(server, requests, watch=watch)
        server.metrics.prompt_tokens.inc(answer.prompt_tokens)
        plan = requests[0].plan
        if plan is not None:
            server.metrics.steered(plan)
        if not answer.request.stream:
            whole: BaseModel = await or_gone(http, answer.whole(generation))
            return Response(as_json(whole), media_type="application/json")
        chunks = answer.chunks(generation)
        first: BaseModel = await or_gone(http, anext(chunks))
        stream = EventStream(_after(first, chunks), close=end)
        handed_over = True
        return stream
    finally:
        if not handed_over:
            await end()


async def _after(first: BaseModel, rest: AsyncIterator[BaseModel]) -> AsyncIterator[BaseModel]:
    yield first
    async for chunk in rest:
        yield chunk

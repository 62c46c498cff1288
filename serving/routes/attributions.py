"""POST /v1/attributions, its progress and its end; GET /v1/attributions/methods."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.attribution.methods.registry import describe
from trimtab.attribution.objective import Objective
from trimtab.attribution.result import Attribution
from trimtab.serving.attribution_run import (
    AttributionBody,
    Question,
    finished,
    method_of,
    model_access,
    progress_body,
    read_prompt,
    result_body,
    submit,
    tokens_of,
)
from trimtab.serving.body import read_object
from trimtab.serving.errors import RequestError
from trimtab.serving.event_stream import EventStream, as_json
from trimtab.serving.generation import or_gone
from trimtab.serving.jobs import Job
from trimtab.serving.openai.attribution_request import EXAMPLES, AttributionRequest
from trimtab.serving.openai.generation_request import read_request
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.openapi import json_body, ref
from trimtab.serving.own_answer import own_answer
from trimtab.serving.prompting import check_number
from trimtab.serving.request_plan import request_plan
from trimtab.serving.state import Server, ServerState
from trimtab.steering.plan import Plan

router = APIRouter(prefix="/v1/attributions", tags=["attribution"])


@router.post(
    "",
    response_model=None,
    openapi_extra=json_body(ref(AttributionRequest), examples=EXAMPLES),
)
async def attributions(http: HttpRequest, server: Server) -> Response:
    """Score the prompt's tokens by what they did for an answer, or for one answer over another."""
    settings = server.settings
    body = await read_object(http, limit=settings.max_body_bytes)
    request = read_request(AttributionRequest, body)
    check_number(request.messages or (), most=settings.max_messages)
    model_access(server)
    method = method_of(server, request)
    plan = await run_in_threadpool(
        request_plan, server, model=request.model, steering=request.steering
    )
    prompt = await read_prompt(server, messages=request.messages, text=request.prompt)
    question = Question(prompt, request, method, plan)
    reservation = server.attributions.reserve()
    try:
        objective = await or_gone(http, _objective(server, request, question))
        job = submit(server, question, objective, reservation=reservation)
    finally:
        reservation.release()
    if request.stream:
        return EventStream(_events(server, job, plan), close=lambda: _ended(job))
    found = await or_gone(http, finished(server, job))
    return Response(
        as_json(AttributionBody(id=job.id, **result_body(found, plan))),
        media_type="application/json",
    )


async def _objective(
    server: ServerState, request: AttributionRequest, question: Question
) -> Objective:
    if request.answer is not None:
        name = "target" if request.target is not None else "preferred"
        answer = await run_in_threadpool(tokens_of, server, request.answer, param=name)
    else:
        answer = await own_answer(
            server,
            tuple(question.prompt.ids),
            plan=question.plan,
            max_tokens=request.max_tokens,
        )
    other = None
    if request.other is not None:
        name = "contrast" if request.contrast is not None else "dispreferred"
        other = await run_in_threadpool(tokens_of, server, request.other, param=name)
    return Objective(answer, other, is_normalized=request.length_normalized)


async def _events(
    server: ServerState, job: Job[Attribution], plan: Plan | None
) -> AsyncIterator[AttributionBody]:
    while not job.is_over:
        job.changed.clear()
        yield AttributionBody(**progress_body(server, job))
        await job.changed.wait()
    found = await job.result
    yield AttributionBody(id=job.id, **result_body(found, plan))


async def _ended(job: Job[Attribution]) -> None:
    job.cancel()


@router.get("/methods", response_model=None)
async def methods(server: Server) -> Response:
    """List the attribution methods with their options."""
    cards = [
        {
            "id": card.name,
            "object": "attribution.method",
            "summary": card.summary,
            "source": card.source,
            "params": card.options,
        }
        for card in describe()
        if card.name != "attnlrp" or server.settings.attnlrp
    ]
    return list_response(cards)


@router.get("/{id}", response_model=None)
async def progress(id: str, server: Server) -> Response:
    """Say how far an attribution is that waits or runs."""
    return JSONResponse(progress_body(server, _job(server, id)))


@router.delete("/{id}", response_model=None)
async def cancel(id: str, server: Server) -> Response:
    """Cancel an attribution that waits or runs; it ends at its next slice."""
    job = _job(server, id)
    job.cancel()
    return deleted_response(job.id, kind="attribution")


def _job(server: ServerState, id: str) -> Job[Attribution]:
    job = server.attributions.find(id)
    if job is None:
        raise RequestError(
            f"There is no attribution {id[:80]!r} that waits or runs.",
            param="id",
            status=404,
            code="not_found",
        )
    return job

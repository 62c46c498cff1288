"""From a request to an attribution in the queue, and from there to what goes over the wire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from trimtab.attribution.attribute import attribute, default_method, rows_of
from trimtab.attribution.errors import AttributionError, TooLargeError
from trimtab.attribution.methods.registry import make, name_of
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt, prompt_from_messages, prompt_from_text
from trimtab.attribution.result import Attribution
from trimtab.attribution.slices import Slices
from trimtab.serving.engines.base import ContextLengthError, ModelAccess
from trimtab.serving.errors import RequestError
from trimtab.serving.jobs import Job, Progress, Reservation
from trimtab.serving.openai.attribution_request import AttributionOptions
from trimtab.serving.openai.chat_request import Message
from trimtab.serving.prompting import chat_ids, text_ids, turns_of
from trimtab.serving.state import ServerState
from trimtab.steering.errors import TrimtabError
from trimtab.steering.plan import Plan


class AttributionBody(BaseModel):
    """An attribution or its progress as it goes over the wire."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class Question:
    """A checked request: what to ask of the model, and how.

    Attributes:
        prompt: the prompt.
        how: the request's options.
        method: the method's own name.
        plan: compiled steering, or None.
        path: JSON path of the options in the request, with its dot; empty at the top.
    """

    prompt: Prompt
    how: AttributionOptions
    method: str
    plan: Plan | None
    path: str = ""


def model_access(server: ServerState) -> ModelAccess:
    """Return the model in process.

    Raises:
        RequestError: 501, the engine has it elsewhere.
    """
    access = server.engine.model_access
    if access is None:
        raise RequestError(
            "This server's engine cannot attribute; serve the model with --engine transformers.",
            status=501,
            code="attribution_unavailable",
        )
    return access


def method_of(server: ServerState, how: AttributionOptions, *, path: str = "") -> str:
    """Return the name of the method a request asks for, its options checked.

    Raises:
        TrimtabError: unknown method or option, or one this server does not offer.
    """
    offered = server.settings.attnlrp
    name = how.method or default_method(model_access(server).subject, attnlrp=offered)
    try:
        make(name, how.params)
    except TrimtabError as error:
        # 400 even for an unknown name: the route is there, the field is at fault.
        raise RequestError(
            error.message,
            param=path + (error.param or "params"),
            code="invalid_attribution",
        ) from None
    if name_of(name) == "attnlrp" and not offered:
        raise RequestError(
            "This server does not offer AttnLRP; use 'kernel_shap'.", param=f"{path}method"
        )
    return name_of(name)


async def read_prompt(
    server: ServerState, *, messages: Sequence[Message] | None, text: str | None
) -> Prompt:
    """Return the prompt as the engine would read it.

    Raises:
        TrimtabError: it cannot be read, or not be attributed.
    """
    info = server.info

    def read() -> Prompt:
        if text is not None:
            ids = text_ids(info.tokenizer, text, max_context=info.max_context, param="prompt")
            prompt = prompt_from_text(info.tokenizer, text)
        else:
            assert messages is not None  # the request has one of the two
            ids = chat_ids(info.tokenizer, messages, max_context=info.max_context)
            prompt = prompt_from_messages(info.tokenizer, turns_of(messages))
        if tuple(prompt.ids) != ids:
            raise AttributionError(
                "This model's tokenizer cuts the text differently when asked for positions; it "
                "cannot be attributed.",
                param="prompt" if text is not None else "messages",
            )
        return prompt

    return await run_in_threadpool(read)


def tokens_of(server: ServerState, text: str, *, param: str) -> tuple[int, ...]:
    """Return an answer's tokens.

    Raises:
        RequestError: it has none, or more than the context holds.
    """
    ids = server.info.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RequestError(f"{param} makes no token.", param=param)
    if len(ids) > server.info.max_context:
        raise ContextLengthError(
            f"{param} has {len(ids)} tokens; the context holds {server.info.max_context}.",
            param=param,
        )
    return tuple(ids)


def submit(
    server: ServerState,
    question: Question,
    objective: Objective,
    *,
    reservation: Reservation | None = None,
) -> Job[Attribution]:
    """Queue the attribution.

    Raises:
        TooLargeError: 413, it takes more work than this server allows.
        OverloadedError: 429, the queue is full.
        AttributionError: it does not fit into the context.
    """
    access = model_access(server)
    prompt, how, path = question.prompt, question.how, question.path
    n_answers = sum(map(len, objective.answers))
    longest = len(prompt.tokens) + max(map(len, objective.answers))
    if longest > server.info.max_context:
        raise ContextLengthError(
            f"Prompt and answer have {longest} tokens; the context holds "
            f"{server.info.max_context}.",
            param="messages",
        )
    rows = rows_of(
        make(question.method, how.params), len(prompt.content), is_measured=how.faithfulness
    )
    work_tokens = rows * (len(prompt.tokens) + n_answers)
    most = server.settings.attribution_max_tokens
    if work_tokens > most:
        raise TooLargeError(
            f"{question.method} reads {rows} rows of {len(prompt.tokens) + n_answers} tokens here, "
            f"{work_tokens} in all; this server allows {most}. Ask for fewer points or samples, "
            "for another method, or of a shorter prompt.",
            param=f"{path}method",
        )

    def work(slices: Slices, progress: Progress) -> Attribution:
        def tell(done: int, total: int) -> None:
            progress("attributing", done, total)

        return attribute(
            access.subject,
            prompt,
            objective,
            method=question.method,
            options=how.params,
            baseline=how.baseline,
            is_measured=how.faithfulness,
            plan=question.plan,
            slices=slices,
            progress=tell,
        )

    return server.attributions.submit(work, access, reservation=reservation)


async def finished(server: ServerState, job: Job[Attribution]) -> Attribution:
    """Return a job's result; it is cancelled if nobody waits for it any more.

    Raises:
        RequestError: 504, it took too long.
        TrimtabError: it failed.
    """
    longest_s = server.settings.request_timeout_s
    try:
        return await asyncio.wait_for(asyncio.shield(job.result), longest_s)
    except TimeoutError:
        raise RequestError(
            f"The attribution took longer than {longest_s:g} s and was cancelled; ask for fewer "
            "points or samples, or send stream true to see its progress.",
            status=504,
            code="timeout",
        ) from None
    finally:
        job.cancel()


def result_body(found: Attribution, plan: Plan | None) -> dict[str, Any]:
    """Return a finished attribution as it goes over the wire, without id.

    Args:
        plan: the steering it ran under, for the receipt.
    """
    body = {"object": "attribution", "created": int(time.time()), **found.to_dict()}
    if plan is not None:
        body["steering"] = plan.receipt
    return body


def progress_body(server: ServerState, job: Job[Attribution]) -> dict[str, Any]:
    """Return how far a job is."""
    eta_s = job.eta_s
    return {
        "id": job.id,
        "object": "attribution.progress",
        "status": job.status.value,
        "position": server.attributions.position(job),
        "done": job.done,
        "total": job.total,
        "eta_s": None if eta_s is None else round(eta_s, 2),
    }

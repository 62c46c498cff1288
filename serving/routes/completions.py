"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.admission import admit, answered, sequences
from trimtab.serving.body import read_object
from trimtab.serving.engines.base import ContextLengthError, EngineInfo
from trimtab.serving.openai.completion_answer import CompletionAnswer, Prompt
from trimtab.serving.openai.completion_request import EXAMPLES, CompletionRequest, read_prompts
from trimtab.serving.openai.generation_request import read_request
from trimtab.serving.openapi import json_body, ref
from trimtab.serving.prompting import text_ids
from trimtab.serving.state import Server

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    response_model=None,
    openapi_extra=json_body(ref(CompletionRequest), examples=EXAMPLES),
)
async def completions(http: HttpRequest, server: Server) -> Response:
    """Continue one or more texts, or score them with `max_tokens` 0."""
    tokenizer = server.info.tokenizer
    body = await read_object(http, limit=server.settings.max_body_bytes)
    request = read_request(CompletionRequest, body)
    vocab_size = len(tokenizer)
    admitted = await admit(server, request, vocab_size=vocab_size)
    raw = read_prompts(
        request.prompt, max_prompts=server.settings.max_prompts, vocab_size=vocab_size
    )
    is_shown = request.echo or server.generation_log is not None
    prompts = await run_in_threadpool(_tokenised, server.info, raw, is_shown=is_shown)
    requests = sequences(
        server,
        request,
        prompts=[prompt.ids for prompt in prompts],
        admitted=admitted,
        wanted_tokens=request.wanted_tokens,
        vocab_size=vocab_size,
        logprobs=request.logprobs,
        prompt_logprobs=request.wanted_prompt_logprobs,
    )
    answer = CompletionAnswer(
        server, request, plan=admitted.plan, probes=admitted.probes, prompts=prompts
    )
    try:
        return await answered(http, server, requests=requests, answer=answer)
    except ContextLengthError as error:
        # Engines know nothing of routes and name the chat's field.
        error.param = "prompt" if error.param in (None, "messages") else error.param
        raise


def _tokenised(
    info: EngineInfo, raw: list[tuple[str, str | tuple[int, ...]]], *, is_shown: bool
) -> list[Prompt]:
    tokenizer, most = info.tokenizer, info.max_context
    prompts = []
    for path, given in raw:
        ids = (
            text_ids(tokenizer, given, max_context=most, param=path)
            if isinstance(given, str)
            else given
        )
        if not is_shown:
            prompts.append(Prompt(ids=ids, text="", first_token=""))
            continue
        shown = given if isinstance(given, str) else tokenizer.decode(ids, skip_special_tokens=True)
        prompts.append(Prompt(ids=ids, text=shown, first_token=tokenizer.decode(ids[:1])))
    return prompts

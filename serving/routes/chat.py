"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.admission import admit, answered, sequences
from trimtab.serving.body import read_object
from trimtab.serving.explained_answer import ExplainedAnswer
from trimtab.serving.openai.chat_answer import ChatAnswer
from trimtab.serving.openai.chat_request import EXAMPLES, ChatRequest
from trimtab.serving.openai.generation_request import read_request
from trimtab.serving.openapi import json_body, ref
from trimtab.serving.prompting import chat_ids, check_number
from trimtab.serving.state import Server

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    openapi_extra=json_body(ref(ChatRequest), examples=EXAMPLES),
)
async def chat_completions(http: HttpRequest, server: Server) -> Response:
    """Answer a conversation, steered if the request has `steering`, streamed if it says so."""
    info = server.info
    body = await read_object(http, limit=server.settings.max_body_bytes)
    request = read_request(ChatRequest, body)
    check_number(request.messages, most=server.settings.max_messages)
    vocab_size = len(info.tokenizer)
    admitted = await admit(server, request, vocab_size=vocab_size)
    ids = await run_in_threadpool(
        chat_ids, info.tokenizer, request.messages, max_context=info.max_context
    )
    requests = sequences(
        server,
        request,
        prompts=[ids],
        admitted=admitted,
        wanted_tokens=request.wanted_tokens,
        vocab_size=vocab_size,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )
    explained = await ExplainedAnswer.of(server, request, admitted.plan)
    answer = ChatAnswer(
        server,
        request,
        plan=admitted.plan,
        probes=admitted.probes,
        prompt_lengths=[len(ids)],
        explain=None if explained is None else explained.explain,
    )
    close = None if explained is None else explained.close
    return await answered(http, server, requests=requests, answer=answer, close=close)

"""The attribution that comes with a chat answer: asked for before it, computed after it."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool

from trimtab.attribution.objective import Objective
from trimtab.serving.attribution_run import (
    Question,
    finished,
    method_of,
    model_access,
    read_prompt,
    result_body,
    submit,
    tokens_of,
)
from trimtab.serving.errors import RequestError, error_of
from trimtab.serving.jobs import Reservation
from trimtab.serving.openai.chat_request import ChatRequest
from trimtab.serving.own_answer import spoken
from trimtab.serving.state import ServerState
from trimtab.steering.plan import Plan

_PATH = "attribution."


class ExplainedAnswer:
    """Attributes the choices of one answer. Whoever makes one must `close` it.

    Its places in the queue are kept from the start, so that no answer is generated whose
    attribution is then refused. What fails after the answer is there is reported in its place:
    the answer is not lost.
    """

    def __init__(
        self,
        server: ServerState,
        question: Question,
        contrast: tuple[int, ...] | None,
        places: list[Reservation],
    ) -> None:
        self._server = server
        self._question = question
        self._contrast = contrast
        self._places = places

    @classmethod
    async def of(
        cls, server: ServerState, request: ChatRequest, plan: Plan | None
    ) -> ExplainedAnswer | None:
        """Return the attribution a chat request asks for, checked; None if it asks for none.

        Raises:
            TrimtabError: it cannot be done, or the queue is full.
        """
        how = request.attribution
        if how is None:
            return None
        model_access(server)
        method = method_of(server, how, path=_PATH)
        prompt = await read_prompt(server, messages=request.messages, text=None)
        if not prompt.content:
            raise RequestError("The messages have no text to attribute to.", param="messages")
        contrast = None
        if how.contrast is not None:
            contrast = await run_in_threadpool(
                tokens_of, server, how.contrast, param=f"{_PATH}contrast"
            )
        places: list[Reservation] = []
        try:
            for _ in range(request.n):
                places.append(server.attributions.reserve())
        except BaseException:
            for place in places:
                place.release()
            raise
        question = Question(prompt, how, method, plan, path=_PATH)
        return cls(server, question, contrast, places)

    async def explain(self, ids: list[int]) -> dict[str, Any]:
        """Return a choice's attribution, or `{"error": ...}` in OpenAI's words."""
        try:
            objective = Objective(
                spoken(self._server, ids),
                self._contrast,
                is_normalized=self._question.how.length_normalized,
            )
            place = self._places.pop()
            job = submit(self._server, self._question, objective, reservation=place)
            found = await finished(self._server, job)
            return {"id": job.id, **result_body(found, self._question.plan)}
        except Exception as error:
            return error_of(error)[1]

    def close(self) -> None:
        """Give back the places that were not used. Safe to call twice."""
        while self._places:
            self._places.pop().release()

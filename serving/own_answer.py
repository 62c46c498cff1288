"""The model's own greedy answer, as tokens, for an attribution that names none."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from trimtab.attribution.objective import without_end_marks
from trimtab.serving.engines.base import Request
from trimtab.serving.errors import RequestError
from trimtab.serving.generation import Generation
from trimtab.serving.sampling import SamplingParams
from trimtab.serving.state import ServerState
from trimtab.steering.plan import Plan


async def own_answer(
    server: ServerState, prompt: tuple[int, ...], *, plan: Plan | None, max_tokens: int
) -> tuple[int, ...]:
    """Return what the model answers under a plan, at most `max_tokens` tokens.

    Raises:
        TrimtabError: the engine refuses or fails.
        RequestError: it answers nothing.
    """
    room = max(1, server.info.max_context - len(prompt))
    sampling = SamplingParams(max_tokens=min(max_tokens, room), temperature=0.0)
    generation = Generation(server, [Request(uuid.uuid4().hex, prompt, sampling, plan)])
    ids: list[int] = []
    try:
        async for _, delta in generation.deltas():
            ids.extend(delta.token_ids)
    finally:
        await generation.close()
    return spoken(server, ids)


def spoken(server: ServerState, ids: Sequence[int]) -> tuple[int, ...]:
    """Return an answer's tokens without the marks that end it.

    Raises:
        RequestError: nothing is left.
    """
    kept = without_end_marks(server.info.tokenizer, ids)
    if not kept:
        raise RequestError(
            "The model's answer is empty; there is nothing to attribute. Give a target.",
            param="target",
            status=422,
            code="empty_answer",
        )
    return kept

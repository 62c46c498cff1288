"""GET /v1/steering/concepts: what can be built from without data of one's own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.openai.openai_list import list_response

router = APIRouter(prefix="/v1/steering/concepts", tags=["steering"])


@router.get("", response_model=None)
async def list_concepts() -> Response:
    """List the bundled data: pairs to build vectors from, and instructions for classifiers."""
    return list_response(await run_in_threadpool(_concepts))


def _concepts() -> list[dict[str, Any]]:
    # Here and not above: training brings libraries that serving does not need.
    from trimtab.training.bundled_sets import classifier_concepts, vector_concepts

    cards = [*vector_concepts(), *classifier_concepts()]
    return [{"object": "steering.concept", **card} for card in cards]

"""GET /v1/steering/methods: the ways to build a vector, from the training registry."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.openai.openai_list import list_response

router = APIRouter(prefix="/v1/steering/methods", tags=["steering"])


@router.get("", response_model=None)
async def list_methods() -> Response:
    """List the methods that `trimtab vectors build` knows, with their options."""
    return list_response(await run_in_threadpool(_methods))


def _methods() -> list[dict[str, Any]]:
    # Here and not above: methods bring their libraries, which serving does not need.
    from trimtab.training.vectors import registry

    return [
        {
            "object": "steering.method",
            "id": card.name,
            "is_default": card.name == registry.DEFAULT,
            "aliases": sorted(a for a, name in registry.ALIASES.items() if name == card.name),
            "summary": card.summary,
            "source": card.source,
            "options": card.options,
        }
        for card in registry.describe()
    ]

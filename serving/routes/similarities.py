"""GET /v1/steering/similarities: how alike the stored vectors are."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.errors import RequestError
from trimtab.serving.query import check_query, layer_of
from trimtab.serving.state import Server
from trimtab.steering.similarity import MAX_VECTORS, similarities
from trimtab.steering.store import Store, check_id
from trimtab.steering.vector import VectorArtifact

router = APIRouter(prefix="/v1/steering/similarities", tags=["steering"])


@router.get("", response_model=None)
async def get_similarities(
    server: Server, http: HttpRequest, ids: str | None = None, layer: str | None = None
) -> Response:
    """Return the cosine similarity of every two stored vectors, null where there is none.

    Two vectors are compared at the layers that either of them steers by default, the mean over
    those at which both have a row; with `layer` at that one alone. `ids=a,b,c` names the vectors,
    in the order of the answer; without it they are all compared, at most 256.
    """
    check_query(http, known=("ids", "layer"))
    at = layer_of(layer)

    def answer() -> Response:
        found = server.store.vectors() if ids is None else _named(server.store, ids)
        body = {
            "object": "steering.similarities",
            "ids": [vector.id for vector in found],
            "layer": at,
            "matrix": similarities(found, layer=at),
        }
        return JSONResponse(body)

    return await run_in_threadpool(answer)


def _named(store: Store, ids: str) -> list[VectorArtifact]:
    names = ids.split(",")
    if len(names) > MAX_VECTORS:
        raise RequestError(
            f"ids names {len(names)} vectors; at most {MAX_VECTORS} are compared at once.",
            param="ids",
        )
    return [store.vector(check_id(name, param="ids"), param="ids") for name in names]

"""GET, PUT and DELETE /v1/steering/vectors."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.body import read_body
from trimtab.serving.errors import RequestError
from trimtab.serving.keys import require_admin
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.state import Server, ServerState
from trimtab.steering.errors import ArtifactError
from trimtab.steering.gguf import from_gguf, to_gguf
from trimtab.steering.lookup import check_belongs
from trimtab.steering.store import check_id
from trimtab.steering.vector import VectorArtifact, from_bytes, to_bytes

router = APIRouter(prefix="/v1/steering/vectors", tags=["steering"])

KIND = "steering.vector"
_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def vector_id(name: str) -> str:
    """Path parameter: an id that cannot be mistaken for a path.

    Raises:
        ArtifactError: it could.
    """
    return check_id(name, param="id")


VectorId = Annotated[str, Depends(vector_id)]


@router.get("", response_model=None)
async def list_vectors(server: Server) -> Response:
    """List the cards of all vectors, and the files that could not be read."""
    cards = await run_in_threadpool(lambda: [_card(v) for v in server.store.vectors()])
    return list_response(cards, problems=dict(server.store.problems))


@router.get("/{name}", response_model=None)
async def get_vector(name: VectorId, server: Server) -> Response:
    """Return one vector's card: where it came from, its layers and its calibration."""
    return JSONResponse(_card(await run_in_threadpool(server.store.vector, name, param="id")))


@router.get("/{name}/content", response_model=None)
async def get_content(
    name: VectorId, server: Server, http: HttpRequest, format: str = "safetensors"
) -> Response:
    """Download a vector: `format` is `safetensors` (all of it) or `gguf` (for llama.cpp)."""
    unknown = set(http.query_params) - {"format"}
    if unknown or format not in ("safetensors", "gguf"):
        param = sorted(unknown)[0][:80] if unknown else "format"
        raise RequestError(
            "The download takes `format`, which is 'safetensors' or 'gguf'.", param=param
        )
    vector = await run_in_threadpool(server.store.vector, name, param="id")
    data = await run_in_threadpool(to_gguf if format == "gguf" else to_bytes, vector)
    headers = {
        "content-disposition": f'attachment; filename="{name}.{format}"',
        "etag": f'"{vector.digest}"',
    }
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.put(
    "/{name}",
    response_model=None,
    openapi_extra=_FILE_BODY,
    dependencies=[Depends(require_admin)],
)
async def put_vector(name: VectorId, server: Server, http: HttpRequest) -> Response:
    """Store a vector: a trimtab safetensors file or a GGUF control vector of the served model.

    The id is the path's, whatever the file says. An existing vector is replaced; requests that
    run keep theirs.
    """
    _ = server.info  # nothing to check it against while the model loads
    data = await read_body(http, limit=server.settings.max_upload_bytes)
    vector, is_new = await run_in_threadpool(_stored, server, name, data)
    return JSONResponse(_card(vector), status_code=201 if is_new else 200)


@router.delete("/{name}", response_model=None, dependencies=[Depends(require_admin)])
async def delete_vector(name: VectorId, server: Server) -> Response:
    """Remove a vector. Requests that run keep theirs."""
    await run_in_threadpool(server.store.delete_vector, name)
    return deleted_response(name, kind=KIND)


def _stored(server: ServerState, name: str, data: bytes) -> tuple[VectorArtifact, bool]:
    info = server.info
    try:
        if data[:4] == b"GGUF":
            vector = from_gguf(data, id=name, name=name)
        else:
            vector = from_bytes(data, name=name)
    except ArtifactError as error:
        error.param = error.param or "body"
        raise
    vector = vector.renamed(name)
    check_belongs(vector.model, info.model, name=name, param="body")
    n_layers = len(info.hidden_norms)
    if vector.layers[-1] >= n_layers:
        raise ArtifactError(
            f"Vector {name!r} has a direction for layer {vector.layers[-1]}; the model has "
            f"layers 0 to {n_layers - 1}.",
            param="body",
        )
    return vector, server.store.put_vector(vector)


def _card(vector: VectorArtifact) -> dict[str, Any]:
    return {"object": KIND, **vector.card()}

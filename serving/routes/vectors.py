"""GET, PUT and DELETE /v1/steering/vectors."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.artifact_files import (
    FILE_BODY,
    VECTOR,
    ArtifactId,
    check_format,
    download,
    problems_in,
    uploaded,
    vector_card,
)
from trimtab.serving.keys import require_admin
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.state import Server
from trimtab.steering.gguf import from_gguf, to_gguf
from trimtab.steering.vector import VectorArtifact, from_bytes, to_bytes

router = APIRouter(prefix="/v1/steering/vectors", tags=["steering"])


@router.get("", response_model=None)
async def list_vectors(server: Server) -> Response:
    """List the cards of all vectors, and the files that could not be read."""
    cards = await run_in_threadpool(lambda: [vector_card(v) for v in server.store.vectors()])
    return list_response(cards, problems=problems_in(server.store, "vectors"))


@router.get("/{name}", response_model=None)
async def get_vector(name: ArtifactId, server: Server) -> Response:
    """Return one vector's card: where it came from, its layers and its calibration."""
    return JSONResponse(vector_card(await run_in_threadpool(server.store.vector, name, param="id")))


@router.get("/{name}/content", response_model=None)
async def get_content(
    name: ArtifactId, server: Server, http: HttpRequest, format: str = "safetensors"
) -> Response:
    """Download a vector: `format` is `safetensors` (all of it) or `gguf` (for llama.cpp)."""
    check_format(http, format, known=("safetensors", "gguf"))
    vector = await run_in_threadpool(server.store.vector, name, param="id")
    data = await run_in_threadpool(to_gguf if format == "gguf" else to_bytes, vector)
    return download(data, file=f"{name}.{format}", digest=vector.digest)


@router.put(
    "/{name}",
    response_model=None,
    openapi_extra=FILE_BODY,
    dependencies=[Depends(require_admin)],
)
async def put_vector(name: ArtifactId, server: Server, http: HttpRequest) -> Response:
    """Store a vector: a trimtab safetensors file or a GGUF control vector of the served model.

    The id is the path's, whatever the file says. An existing vector is replaced; requests that
    run keep theirs.
    """
    vector, is_new = await uploaded(
        http, server, name=name, what="vector", read=_read, put=server.store.put_vector
    )
    return JSONResponse(vector_card(vector), status_code=201 if is_new else 200)


@router.delete("/{name}", response_model=None, dependencies=[Depends(require_admin)])
async def delete_vector(name: ArtifactId, server: Server) -> Response:
    """Remove a vector. Requests that run keep theirs."""
    await run_in_threadpool(server.store.delete_vector, name)
    return deleted_response(name, kind=VECTOR)


def _read(data: bytes, name: str) -> VectorArtifact:
    if data[:4] == b"GGUF":
        return from_gguf(data, id=name, name=name)
    return from_bytes(data, name=name)

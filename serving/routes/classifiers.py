"""GET, PUT and DELETE /v1/steering/classifiers."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.artifact_files import (
    CLASSIFIER,
    FILE_BODY,
    ArtifactId,
    check_format,
    classifier_card,
    download,
    problems_in,
    uploaded,
)
from trimtab.serving.keys import require_admin
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.state import Server
from trimtab.steering.classifier import ClassifierArtifact, from_bytes, to_bytes

router = APIRouter(prefix="/v1/steering/classifiers", tags=["steering"])


@router.get("", response_model=None)
async def list_classifiers(server: Server) -> Response:
    """List the cards of all classifiers, and the files that could not be read."""
    cards = await run_in_threadpool(
        lambda: [classifier_card(c) for c in server.store.classifiers()]
    )
    return list_response(cards, problems=problems_in(server.store, "classifiers"))


@router.get("/{name}", response_model=None)
async def get_classifier(name: ArtifactId, server: Server) -> Response:
    """Return one classifier's card: its labels, layers, held-out measures and calibrated doses."""
    return JSONResponse(
        classifier_card(await run_in_threadpool(server.store.classifier, name, param="id"))
    )


@router.get("/{name}/content", response_model=None)
async def get_content(
    name: ArtifactId, server: Server, http: HttpRequest, format: str = "safetensors"
) -> Response:
    """Download a classifier; `format` is `safetensors`."""
    check_format(http, format, known=("safetensors",))
    classifier = await run_in_threadpool(server.store.classifier, name, param="id")
    data = await run_in_threadpool(to_bytes, classifier)
    return download(data, file=f"{name}.safetensors", digest=classifier.digest)


@router.put(
    "/{name}",
    response_model=None,
    openapi_extra=FILE_BODY,
    dependencies=[Depends(require_admin)],
)
async def put_classifier(name: ArtifactId, server: Server, http: HttpRequest) -> Response:
    """Store a classifier of the served model: a trimtab safetensors file.

    The id is the path's, whatever the file says. An existing classifier is replaced; requests
    that run keep theirs.
    """
    classifier, is_new = await uploaded(
        http, server, name=name, what="classifier", read=_read, put=server.store.put_classifier
    )
    return JSONResponse(classifier_card(classifier), status_code=201 if is_new else 200)


@router.delete("/{name}", response_model=None, dependencies=[Depends(require_admin)])
async def delete_classifier(name: ArtifactId, server: Server) -> Response:
    """Remove a classifier. Requests that run keep theirs."""
    await run_in_threadpool(server.store.delete_classifier, name)
    return deleted_response(name, kind=CLASSIFIER)


def _read(data: bytes, name: str) -> ClassifierArtifact:
    return from_bytes(data, name=name)

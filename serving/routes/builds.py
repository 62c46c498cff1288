"""POST, GET and DELETE /v1/steering/builds: vectors and classifiers built by the served model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.body import read_object
from trimtab.serving.build_request import (
    BuildRequest,
    ClassifierBuildRequest,
    VectorBuildRequest,
    read_build,
)
from trimtab.serving.build_run import build_access, build_work
from trimtab.serving.build_schema import EXAMPLES
from trimtab.serving.builds import Built
from trimtab.serving.engines.base import ModelAccess
from trimtab.serving.jobs import Work
from trimtab.serving.keys import require_admin
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.openapi import json_body, ref
from trimtab.serving.state import Server, ServerState

router = APIRouter(prefix="/v1/steering/builds", tags=["steering"])


@router.post(
    "",
    response_model=None,
    status_code=202,
    openapi_extra=json_body(
        {"oneOf": [ref(VectorBuildRequest), ref(ClassifierBuildRequest)]}, examples=EXAMPLES
    ),
    dependencies=[Depends(require_admin)],
)
async def start_build(http: HttpRequest, server: Server) -> Response:
    """Start to build a vector or a classifier beside the requests that run, and store it.

    Answers at once with the build's state; ask for it again to see how far it is.
    """
    access = build_access(server)
    body = await read_object(http, limit=server.settings.max_body_bytes)
    request, work = await run_in_threadpool(_checked, server, access, body)
    build = server.builds.submit(
        work, access, kind=body["kind"], artifact=request.id, overwrite=request.overwrite
    )
    return JSONResponse(
        server.builds.state(build),
        status_code=202,
        headers={"location": f"{router.prefix}/{build.id}"},
    )


@router.get("", response_model=None)
async def list_builds(server: Server) -> Response:
    """List the builds that wait or run and the last that ended, newest first.

    501 if this server's engine cannot build.
    """
    build_access(server)
    return list_response(server.builds.states())


@router.get("/{id}", response_model=None)
async def get_build(id: str, server: Server) -> Response:
    """Say how far a build is; once it is done, with the stored artifact's card."""
    return JSONResponse(server.builds.state(server.builds.find(id)))


@router.delete("/{id}", response_model=None, dependencies=[Depends(require_admin)])
async def delete_build(id: str, server: Server) -> Response:
    """Cancel a build that waits or runs and answer its state, or forget one that is over.

    A cancelled build ends at its next piece of work and stores nothing.
    """
    build = server.builds.find(id)
    if build.is_over:
        server.builds.forget(build)
        return deleted_response(build.id, kind="steering.build")
    build.cancel()
    return JSONResponse(server.builds.state(build))


def _checked(
    server: ServerState, access: ModelAccess, body: dict[str, Any]
) -> tuple[BuildRequest, Work[Built]]:
    settings = server.settings
    request = read_build(body, max_rows=settings.build_max_rows, max_chars=settings.build_max_chars)
    return request, build_work(server, access, request)

"""GET, PUT and DELETE /v1/steering/presets, and POST /v1/steering/check."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.serving.artifact_files import ArtifactId, problems_in
from trimtab.serving.body import read_json, read_object
from trimtab.serving.errors import RequestError
from trimtab.serving.keys import require_admin
from trimtab.serving.openai.generation_request import STEERING_SCHEMA
from trimtab.serving.openai.openai_list import deleted_response, list_response
from trimtab.serving.openai.unsupported import refuse_unknown
from trimtab.serving.openapi import json_body
from trimtab.serving.request_plan import compile_spec, read_spec, request_plan
from trimtab.serving.state import Server, ServerState
from trimtab.steering.plan import Plan
from trimtab.steering.spec import SteeringSpec

router = APIRouter(prefix="/v1/steering", tags=["steering"])

KIND = "steering.preset"
_SPEC = {"vectors": [{"id": "optimistic", "scale": 0.8}]}
_SPEC_EXAMPLES = {"spec": {"value": _SPEC}, "string": {"value": "0.8 optimistic - 0.3 formal"}}
_CHECK_SCHEMA = {
    "type": "object",
    "properties": {"model": {"type": "string"}, "steering": STEERING_SCHEMA},
    "additionalProperties": False,
}
_CHECK_EXAMPLES = {"check": {"value": {"model": "MODEL", "steering": _SPEC}}}


@router.get("/presets", response_model=None)
async def list_presets(server: Server) -> Response:
    """List all presets, each also a model name, and the files that could not be read."""
    presets = await run_in_threadpool(server.store.presets)
    listed = [_preset(server, name, spec) for name, spec in presets.items()]
    return list_response(listed, problems=problems_in(server.store, "presets"))


@router.get("/presets/{name}", response_model=None)
async def get_preset(name: ArtifactId, server: Server) -> Response:
    """Return one preset."""
    spec = await run_in_threadpool(server.store.preset, name, param="id")
    return JSONResponse(_preset(server, name, spec))


@router.put(
    "/presets/{name}",
    response_model=None,
    openapi_extra=json_body(STEERING_SCHEMA, examples=_SPEC_EXAMPLES),
    dependencies=[Depends(require_admin)],
)
async def put_preset(name: ArtifactId, server: Server, http: HttpRequest) -> Response:
    """Save a spec under a name, after compiling it once: what cannot run is not saved."""
    _ = server.info  # nothing to check it against while the model loads
    body = await read_json(http, limit=server.settings.max_body_bytes)
    spec = read_spec(body, path="preset")
    plan = await run_in_threadpool(compile_spec, server, spec, path="preset")
    is_new = await run_in_threadpool(server.store.put_preset, name, spec)
    answer = {**_preset(server, name, spec), "check": _report(plan)}
    return JSONResponse(answer, status_code=201 if is_new else 200)


@router.delete("/presets/{name}", response_model=None, dependencies=[Depends(require_admin)])
async def delete_preset(name: ArtifactId, server: Server) -> Response:
    """Remove a preset and its model name. Requests that run are not touched."""
    await run_in_threadpool(server.store.delete_preset, name)
    return deleted_response(name, kind=KIND)


@router.post(
    "/check",
    response_model=None,
    openapi_extra=json_body(_CHECK_SCHEMA, examples=_CHECK_EXAMPLES),
)
async def check(server: Server, http: HttpRequest) -> Response:
    """Compile a spec as a request would, and return its report without generating."""
    body = await read_object(http, limit=server.settings.max_body_bytes)
    body = {key: value for key, value in body.items() if value is not None}
    refuse_unknown(body, known=("model", "steering"))
    model = body.get("model", server.served_name)
    if not isinstance(model, str):
        raise RequestError("model must be a string.", param="model")
    steering = body.get("steering")
    plan = await run_in_threadpool(request_plan, server, model=model, steering=steering)
    if plan is None:
        raise RequestError(
            "There is nothing to check: give `steering`, or a preset's model name.",
            param="steering",
        )
    return JSONResponse({"object": "steering.check", **_report(plan)})


def _preset(server: ServerState, name: str, spec: SteeringSpec) -> dict[str, Any]:
    return {
        "object": KIND,
        "id": name,
        "model": f"{server.served_name}:{name}",
        "spec": spec.model_dump(mode="json", exclude_defaults=True),
    }


def _report(plan: Plan) -> dict[str, Any]:
    return plan.receipt

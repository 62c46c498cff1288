"""GET /v1/models: the served model, and every preset as a model of its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from openai.types import Model
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.event_stream import as_json
from trimtab.serving.openai.openai_list import list_response
from trimtab.serving.request_plan import preset_of
from trimtab.serving.state import Server, ServerState

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=None)
async def list_models(server: Server) -> Response:
    """List the served model and `<model>:<preset>` for each preset."""
    presets = await run_in_threadpool(server.store.presets)
    names = [server.served_name, *(f"{server.served_name}:{name}" for name in presets)]
    return list_response([_model(server, name).model_dump(exclude_unset=True) for name in names])


@router.get("/v1/models/{name:path}", response_model=None)
async def get_model(name: str, server: Server) -> Response:
    """Describe one model."""
    preset = preset_of(server, name)
    if preset is not None:
        await run_in_threadpool(server.store.preset, preset, param="model")
    return Response(as_json(_model(server, name)), media_type="application/json")


def _model(server: ServerState, name: str) -> Model:
    info = server.info
    extra: dict[str, Any] = {"max_model_len": info.max_context, "root": info.model.id}
    if info.model.quantization is not None:
        extra["quantization"] = info.model.quantization
    return Model(id=name, created=server.started, object="model", owned_by="trimtab", **extra)

"""The OpenAPI document behind /docs: our own request models, with examples to try at once."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trimtab.serving.build_request import ClassifierBuildRequest, VectorBuildRequest
from trimtab.serving.openai.attribution_request import AttributionRequest
from trimtab.serving.openai.chat_request import ChatRequest, TextPart
from trimtab.serving.openai.completion_request import CompletionRequest
from trimtab.serving.state import ServerState
from trimtab.steering.spec import SteeringSpec

# Routes read their bodies themselves (see body.py), so FastAPI does not know these models.
_MODELS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    TextPart,
    CompletionRequest,
    AttributionRequest,
    VectorBuildRequest,
    ClassifierBuildRequest,
    SteeringSpec,
)


def json_body(schema: dict[str, Any], *, examples: dict[str, Any]) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a JSON body."""
    content = {"application/json": {"schema": schema, "examples": examples}}
    return {"requestBody": {"required": True, "content": content}}


def ref(model: type[BaseModel]) -> dict[str, str]:
    """Return the reference to a request model's schema."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def install_openapi(app: FastAPI, server: ServerState) -> None:
    """Make /openapi.json hold the request models, and examples that name the served model."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, own = models_json_schema(
            [(model, "validation") for model in _MODELS],
            ref_template="#/components/schemas/{model}",
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(own["$defs"])
        if not server.lifecycle.is_ready:
            return schema
        text = json.dumps(schema).replace('"MODEL"', json.dumps(server.served_name))
        app.openapi_schema = json.loads(text)
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]

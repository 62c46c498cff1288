"""Our routes on vLLM's own server: vectors, classifiers, presets, and what can be built.

vLLM loads this if VLLM_PLUGINS names trimtab. The routes are an app of their own behind one route
of vLLM's, with its own state and errors, because vLLM keeps its own things under the same names.
All that vLLM puts around its app (keys, CORS, request ids) is around ours too.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.serving.engines.vllm.plain_steering import steering_of
from trimtab.serving.engines.vllm.plugin import is_switched_on
from trimtab.serving.engines.vllm.unheard import Listener
from trimtab.serving.errors import install_error_handlers
from trimtab.serving.keys import KeyGuard, is_known
from trimtab.serving.request_context import RequestContext
from trimtab.serving.routes import classifiers, concepts, methods, presets, similarities, vectors
from trimtab.serving.state import ServerState

log = logging.getLogger("trimtab.serving")

PATH = "/v1/steering/{rest:path}"


class SteeringRoutes:
    """vLLM's `EndpointPlugin`; see its vllm/plugins/endpoint_plugins/interface.py."""

    name = "trimtab"
    required_tasks = ("generate",)
    __name__ = "trimtab_steering"  # vLLM lists its routes by their functions' names

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes to vLLM's app. Called before its middleware is put around it."""
        app.add_middleware(Listener)
        if is_switched_on():
            app.router.routes.append(Route(PATH, endpoint=self, include_in_schema=False))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Measure the model, so that what cannot be steered is known before anybody asks.

        Raises:
            ModelLoadError: steering does not reach the model.
        """
        if engine_client is None or not is_switched_on():
            return
        steering = steering_of(engine_client)
        await steering.served()
        server = steering.server
        keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        api_keys = tuple(key for key in keys if key)
        server.settings = server.settings.model_copy(update={"api_keys": api_keys})
        if api_keys and not _any_known(server.settings.admin_keys, api_keys):
            log.warning(
                "nobody can change vectors here: a key must be both in TRIMTAB_ADMIN_KEYS and "
                "among vLLM's --api-key"
            )
        self._app = _app(server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request below /v1/steering."""
        assert self._app is not None, "vLLM serves before its plugins are ready"
        await self._app(scope, receive, send)


plugin = SteeringRoutes
"""What the entry point names."""


def _any_known(keys: tuple[str, ...], among: tuple[str, ...]) -> bool:
    return any(is_known(key, among) for key in keys)


def _app(server: ServerState) -> FastAPI:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.server = server
    for route in (methods, concepts, vectors, similarities, classifiers, presets):
        app.include_router(route.router)
    install_error_handlers(app)
    # The last added is the outermost.
    app.add_middleware(KeyGuard, settings=server.settings)
    app.add_middleware(RequestContext, metrics=server.metrics)
    return app

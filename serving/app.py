"""The HTTP app: one engine, one store, all routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from trimtab.attribution.result import Attribution
from trimtab.serving.builds import Builds
from trimtab.serving.engines.base import Engine
from trimtab.serving.errors import install_error_handlers
from trimtab.serving.generation_log import GenerationLog
from trimtab.serving.jobs import JobQueue, JobStatus
from trimtab.serving.keys import KeyGuard
from trimtab.serving.lifecycle import Lifecycle
from trimtab.serving.metrics import Metrics
from trimtab.serving.openapi import install_openapi
from trimtab.serving.request_context import RequestContext
from trimtab.serving.routes import (
    attributions,
    builds,
    chat,
    classifiers,
    completions,
    concepts,
    methods,
    models,
    presets,
    service,
    similarities,
    vectors,
)
from trimtab.serving.settings import ServerSettings
from trimtab.serving.state import ServerState
from trimtab.steering.store import Store

_DESCRIPTION = """An OpenAI-compatible server whose requests may each be steered their own way.
Add `steering` to a completions request; unknown or unsupported fields are refused by name."""


def create_app(
    engine: Engine,
    store: Store,
    *,
    settings: ServerSettings,
    on_ready: Callable[[], None] | None = None,
    on_failed: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """Return the app for one engine.

    The engine starts in the background when the app does, so that the port opens at once and
    /health says how far it is; it stops with the app.

    Args:
        engine: not yet started.
        store: the served model's vectors, classifiers and presets.
        settings: names, keys, limits.
        on_ready: called once requests can be answered.
        on_failed: called with the error if the engine cannot start; the app keeps answering 503
            until the caller ends it.

    Raises:
        TrimtabError: the generation log cannot be opened.
    """
    lifecycle = Lifecycle(engine, on_ready=on_ready, on_failed=on_failed)
    attributed: JobQueue[Attribution] = JobQueue(
        what="attribution", prefix="attr", max_queue=settings.attribution_max_queue
    )

    def count(kind: str, status: JobStatus) -> None:
        metrics.builds.labels(kind, status.value).inc()

    built = Builds(max_queue=settings.build_max_queue, on_end=count)
    metrics = Metrics(lifecycle, attributed, built)
    generation_log = None
    if settings.log_generations is not None:
        generation_log = GenerationLog(
            settings.log_generations,
            max_bytes=settings.log_generations_max_bytes,
            metrics=metrics,
        )
    server = ServerState(
        engine=engine,
        store=store,
        settings=settings,
        lifecycle=lifecycle,
        metrics=metrics,
        attributions=attributed,
        builds=built,
        generation_log=generation_log,
        started=int(time.time()),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await lifecycle.begin()
        try:
            yield
        finally:
            await asyncio.gather(attributed.close(), built.close())
            await lifecycle.end()
            if generation_log is not None:
                await run_in_threadpool(generation_log.close)

    app = FastAPI(
        title="trimtab",
        version=version("trimtab"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        # A redirect would answer a mistyped path with an empty body.
        redirect_slashes=False,
    )
    app.state.server = server
    for route in (chat, completions, attributions, models, methods, concepts):
        app.include_router(route.router)
    for route in (vectors, similarities, classifiers, builds, presets, service):
        app.include_router(route.router)
    install_error_handlers(app)
    install_openapi(app, server)
    # The last added is the outermost.
    app.add_middleware(KeyGuard, settings=settings)
    app.add_middleware(RequestContext, metrics=metrics)
    return app

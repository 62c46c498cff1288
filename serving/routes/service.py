"""GET /health, /version, /metrics."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from trimtab.serving.lifecycle import DEAD
from trimtab.serving.state import Server

router = APIRouter(tags=["service"])


@router.get("/health", response_model=None)
async def health(server: Server) -> Response:
    """Say whether requests can be answered: 200 ready, 503 loading or failed."""
    life = server.lifecycle
    if life.error is not None:
        return JSONResponse({"status": "failed", "error": life.why}, status_code=503)
    if not life.is_ready:
        return JSONResponse({"status": "loading"}, status_code=503, headers={"retry-after": "2"})
    if not life.engine.is_alive:
        return JSONResponse({"status": "failed", "error": DEAD}, status_code=503)
    stats = life.engine.stats()
    return JSONResponse(
        {
            "status": "ok",
            "model": server.served_name,
            "running": stats.running,
            "waiting": stats.waiting,
        }
    )


@router.get("/version", response_model=None)
async def get_version() -> Response:
    """Return trimtab's version."""
    return JSONResponse({"version": version("trimtab")})


@router.get("/metrics", response_model=None)
async def metrics(server: Server) -> Response:
    """Return Prometheus' text format."""
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

"""What every route needs: the engine, the store, the settings, the metrics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from trimtab.attribution.result import Attribution
from trimtab.serving.builds import Builds
from trimtab.serving.engines.base import Engine, EngineInfo
from trimtab.serving.generation_log import GenerationLog
from trimtab.serving.jobs import JobQueue
from trimtab.serving.lifecycle import Lifecycle
from trimtab.serving.metrics import Metrics
from trimtab.serving.settings import ServerSettings
from trimtab.steering.compile import Limits
from trimtab.steering.store import Store


@dataclass
class ServerState:
    """One app's parts, at `app.state.server`."""

    engine: Engine
    store: Store
    settings: ServerSettings
    lifecycle: Lifecycle
    metrics: Metrics
    attributions: JobQueue[Attribution]
    builds: Builds
    generation_log: GenerationLog | None = None
    started: int = field(default=0)

    @property
    def info(self) -> EngineInfo:
        """Facts about the served model.

        Raises:
            NotReadyError: it is not loaded.
        """
        return self.lifecycle.info

    @property
    def served_name(self) -> str:
        """The model's name on the wire."""
        return self.settings.served_model_name or self.info.model.id

    @property
    def limits(self) -> Limits:
        """What steering may ask for."""
        return Limits(max_dose=self.settings.max_dose, thinking=self.info.has_thinking)

    @property
    def system_fingerprint(self) -> str | None:
        """OpenAI's field: changes when the model's config, weight shapes or quantisation do."""
        model = self.info.model
        if model.fingerprint is None:
            return None
        served = model.fingerprint
        if model.quantization is not None:
            served = hashlib.sha256(f"{served} {model.quantization}".encode()).hexdigest()
        return f"fp_{served[:12]}"


def server_state(request: Request) -> ServerState:
    """Route dependency: the app's parts."""
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(server_state)]

"""What requests of vLLM's own server ask for, compiled: one of these beside each `AsyncLLM`."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

from pydantic import ValidationError

from trimtab.attribution.result import Attribution
from trimtab.serving.builds import Builds
from trimtab.serving.engines.base import (
    EngineError,
    EngineInfo,
    EngineStats,
    ModelAccess,
    Request,
)
from trimtab.serving.engines.vllm.networks import Networks
from trimtab.serving.engines.vllm.plain_answers import Asked
from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY, PRESET, packed_request, readers_of
from trimtab.serving.engines.vllm.served_model import ServedModel, measured
from trimtab.serving.jobs import JobQueue
from trimtab.serving.lifecycle import Lifecycle
from trimtab.serving.metrics import Metrics
from trimtab.serving.request_plan import request_plan
from trimtab.serving.settings import ServerSettings
from trimtab.serving.state import ServerState
from trimtab.steering.bank_room import check_fits
from trimtab.steering.errors import ModelLoadError, NotFoundError
from trimtab.steering.model.paths import data_home, model_id, store_id
from trimtab.steering.store import Store, model_folder

MAX_DOSE = "TRIMTAB_MAX_DOSE"
ADMIN_KEYS = "TRIMTAB_ADMIN_KEYS"

_CACHED = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")


def environment_settings() -> ServerSettings:
    """Return the settings of a server whose command line is vLLM's: the environment's.

    Raises:
        ModelLoadError: a variable is not what it must be. Its value is not repeated: it may be a
            key.
    """
    given = os.environ.get(MAX_DOSE, "").strip()
    keys = [key.strip() for key in os.environ.get(ADMIN_KEYS, "").split(",")]
    options: dict[str, Any] = {"admin_keys": tuple(key for key in keys if key)}
    if given:
        options["max_dose"] = None if given.lower() in ("none", "any") else given
    try:
        return ServerSettings(**options)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = {"max_dose": MAX_DOSE}.get(str(first["loc"][0]), ADMIN_KEYS)
        raise ModelLoadError(f"{name}: {first['msg']}.") from None


def public_name(model: str) -> str:
    """Return a model's name, also where vLLM has put a folder of the hub's cache in its place."""
    cached = _CACHED.search(model)
    return cached[1].replace("--", "/") if cached else model_id(model)


def _store_name(model: str) -> str:
    return public_name(model) if _CACHED.search(model) else store_id(model)


def steering_of(llm: Any) -> PlainSteering:
    """Return what compiles the requests of an `AsyncLLM`; made when it is first asked for."""
    mine: PlainSteering | None = getattr(llm, "_trimtab_steering", None)
    if mine is None:
        mine = llm._trimtab_steering = PlainSteering(llm)
    return mine


class PlainSteering:
    """Compiles what requests ask for, against the store of the served model.

    Args:
        llm: vLLM's engine in this process.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._source: str = llm.vllm_config.model_config.model
        self._name = public_name(self._source)
        self._networks = Networks(llm)
        self._measuring: asyncio.Task[ServedModel] | None = None
        lifecycle = Lifecycle(_Guest(self))
        lifecycle.is_ready = True  # vLLM runs already, and the guest says what it does not know yet
        # No route of ours there starts either.
        attributions: JobQueue[Attribution] = JobQueue(
            what="attribution", prefix="attr", max_queue=1
        )
        builds = Builds(max_queue=1)
        served_name = llm.vllm_config.model_config.served_model_name
        if isinstance(served_name, list):
            served_name = served_name[0]
        self.server = ServerState(
            engine=lifecycle.engine,
            store=Store(model_folder(data_home(), _store_name(self._source))),
            settings=environment_settings().model_copy(update={"served_model_name": served_name}),
            lifecycle=lifecycle,
            metrics=Metrics(lifecycle, attributions, builds),
            attributions=attributions,
            builds=builds,
        )

    @property
    def known(self) -> ServedModel | None:
        """The model's facts, if it has been measured."""
        task = self._measuring
        if task is None or not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()

    async def served(self) -> ServedModel:
        """Return the model's facts, measured at the first call; after a failure at the next.

        Raises:
            ModelLoadError: steering does not reach it.
        """
        task = self._measuring
        if task is None or (task.done() and self.known is None):
            reason = f"{self._source}, which vLLM serves."
            task = self._measuring = asyncio.create_task(
                measured(self._llm, name=self._name, source=self._source, reason=reason),
                name="trimtab-measure",
            )
        return await asyncio.shield(task)

    async def asked(self, extra_args: dict[str, Any]) -> Asked:
        """Compile what a request's `vllm_xargs` ask for.

        Raises:
            TrimtabError: with the JSON path of what is at fault.
        """
        served = await self.served()
        preset = extra_args.get(PRESET)
        path = f"vllm_xargs.{ASKED if preset is None else PRESET}"
        plan = await asyncio.to_thread(self._plan, extra_args.get(ASKED), preset)
        check_fits(plan, served.size, param=path)
        return Asked(plan, served, path)

    def _plan(self, steering: Any, preset: Any) -> Any:
        model = self.server.served_name
        if preset is not None:
            path = f"vllm_xargs.{PRESET}"
            if not isinstance(preset, str):
                raise NotFoundError(f"{path} must be the name of a preset.", param=path)
            self.server.store.preset(preset, param=path)
            model = f"{model}:{preset}"
        xargs = None if steering is None else {ASKED: steering}
        return request_plan(self.server, model=model, steering=None, xargs=xargs)

    async def packed(self, asked: Asked) -> dict[str, Any]:
        """Return what must travel with the request, after its networks are on the workers."""
        plan = asked.plan
        if not plan.parts:  # every scale is 0
            return {}
        await self._networks.teach(readers_of(plan, ()))
        return {KEY: packed_request(plan, marks=asked.served.marks_for(plan))}


class _Guest:
    """An `Engine` for routes that only ask what the model is: vLLM's own routes generate.

    Args:
        steering: knows the model.
    """

    def __init__(self, steering: PlainSteering) -> None:
        self._steering = steering

    @property
    def info(self) -> EngineInfo:
        known = self._steering.known
        if known is None:
            raise EngineError("The model has not been measured yet.")
        return known.info

    @property
    def model_access(self) -> ModelAccess | None:
        return None

    async def start(self) -> None:
        await self._steering.served()

    def check(self, request: Request) -> None:
        raise EngineError("vLLM's own routes generate.")

    def generate(self, *requests: Request) -> list[Any]:
        raise EngineError("vLLM's own routes generate.")

    @property
    def is_alive(self) -> bool:
        return True  # who asks is inside vLLM's server, which ends with its engine

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0)

    async def stop(self) -> None:
        return None

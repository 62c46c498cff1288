"""The vLLM engine: the same contract as the embedded one, over vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from trimtab.serving.detokenizer import TokenText
from trimtab.serving.engines.base import (
    Delta,
    EngineError,
    EngineInfo,
    EngineStats,
    ModelAccess,
    Request,
)
from trimtab.serving.engines.delta_stream import DeltaStream
from trimtab.serving.engines.limits import check_context, check_queue
from trimtab.serving.engines.vllm.answer import Answer, SplitPromptFailure
from trimtab.serving.engines.vllm.networks import Networks
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_request, readers_of
from trimtab.serving.engines.vllm.quantization_choice import check_folder
from trimtab.serving.engines.vllm.reports import INBOXES, Inbox, failure_on_any, steps_seen
from trimtab.serving.engines.vllm.sampling import vllm_params
from trimtab.serving.engines.vllm.served_model import ServedModel, measured
from trimtab.steering.bank_room import BankRoom, check_fits
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import located
from trimtab.steering.plan import Plan

logger = logging.getLogger(__name__)

# Tries of a request whose gate needs its prompt whole, while the scheduler splits it.
_TRIES = 100
# Share of the memory that vLLM takes on a CPU. By its own default, made for a GPU of its own, it
# does not start where anybody else uses a tenth.
_CPU_SHARE = 0.4


@dataclass(frozen=True)
class VllmConfig:
    """How the engine is run.

    Attributes:
        max_queue: sequences that may wait beyond those that run; more are refused with 429.
        options: vLLM's own engine arguments by name, such as `tensor_parallel_size`.
    """

    max_queue: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)


class VllmEngine:
    """Serves a model on vLLM, each request steered its own way. See `Engine` for the contract.

    Args:
        model: `smollm2`, a local folder, or a Hugging Face id.
        config: sizes and vLLM's options.
    """

    def __init__(self, model: str, *, config: VllmConfig | None = None) -> None:
        self._model = model
        self.config = config or VllmConfig()
        self._llm: Any = None
        self._served: ServedModel | None = None
        self._networks: Networks | None = None
        self._text: TokenText | None = None
        self._room: BankRoom | None = None
        self._max_running = 0
        self._live: dict[str, asyncio.Task[None]] = {}
        self._in_line: deque[tuple[Plan, asyncio.Future[None]]] = deque()

    # --- contract

    @property
    def info(self) -> EngineInfo:
        """Facts about the model; valid once `start` has returned."""
        if self._served is None:
            raise EngineError("The engine is still loading.")
        return self._served.info

    @property
    def model_access(self) -> ModelAccess | None:
        """None: the model is in vLLM's processes, without gradients."""
        return None

    async def start(self) -> None:
        """Start vLLM's processes, check that every layer is armed, and measure the model.

        Raises:
            ModelLoadError: vLLM is not installed, does not fit, or cannot load the model.
        """
        try:
            await self._start()
        except ModelLoadError:
            await self.stop()
            raise
        except Exception as error:
            await self.stop()
            raise ModelLoadError(f"vLLM cannot serve {self._model!r}: {error}") from error

    async def _start(self) -> None:
        name, source, reason = located(self._model)
        quantization = await asyncio.to_thread(check_folder, source)
        if quantization is not None:
            reason = f"{reason.removesuffix('.')}, quantised: {quantization.label}."
        self._llm = await asyncio.to_thread(_launched, source, dict(self.config.options))
        self._networks = Networks(self._llm)
        self._served = await measured(self._llm, name=name, source=source, reason=reason)
        self._room = BankRoom(self._served.size)
        self._max_running = int(self._llm.vllm_config.scheduler_config.max_num_seqs)
        self._text = TokenText(self._served.info.tokenizer)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ContextLengthError: prompt plus max_tokens exceed the context.
            SpecError: the plan can never fit the bank, or this vLLM cannot do what it asks.
        """
        check_context(request, most=self.info.max_context)
        assert self._room is not None
        assert self._served is not None
        if request.plan is not None:
            check_fits(request.plan, self._room.size)
        self._served.support.check(request)

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        """Queue requests together, all or none.

        Raises:
            OverloadedError: the queue has no room for all of them.
            EngineError: the engine is not running.
        """
        if self._served is None or not self.is_alive:
            raise EngineError("The engine is not running.")
        check_queue(
            len(requests),
            load=len(self._live),
            max_running=self._max_running,
            max_queue=self.config.max_queue,
        )
        for request in requests:
            self.check(request)
        return [self._started(request) for request in requests]

    @property
    def is_alive(self) -> bool:
        """False once vLLM's processes have died."""
        return self._llm is not None and not self._llm.errored

    def stats(self) -> EngineStats:
        """Return the load now."""
        room = self._room
        if room is None:
            return EngineStats(0, 0, 0, 0, 0)
        load = len(self._live)
        running = min(load - len(self._in_line), self._max_running)
        return EngineStats(running, load - running, room.used.slots, room.size.slots, steps_seen())

    async def stop(self) -> None:
        """Cancel what runs and end vLLM's processes. Safe to call twice."""
        for task in list(self._live.values()):
            task.cancel()
        await asyncio.gather(*self._live.values(), return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    # --- one request

    def _started(self, request: Request) -> DeltaStream:
        def cancel() -> None:
            task.cancel()

        stream = DeltaStream(cancel)
        task = asyncio.create_task(self._run(request, stream), name=f"trimtab {request.id}")
        self._live[request.id] = task
        task.add_done_callback(lambda _: self._live.pop(request.id, None))
        return stream

    async def _run(self, request: Request, stream: DeltaStream) -> None:
        plan = request.plan if request.plan is not None and request.plan.parts else None
        try:
            if plan is not None:
                await self._enter(plan)
            try:
                await self._answer(request, plan, stream)
            finally:
                if plan is not None:
                    self._leave(plan)
        except asyncio.CancelledError:
            raise
        except EngineError as error:
            stream.put(error)
        except Exception as error:
            logger.error("request %s failed", request.id, exc_info=error)
            stream.put(EngineError(f"The engine failed on this request: {error}"))

    async def _answer(self, request: Request, plan: Plan | None, stream: DeltaStream) -> None:
        for left in reversed(range(_TRIES)):
            try:
                await self._try(request, plan, stream)
                return
            except SplitPromptFailure:
                if not left:
                    raise
                await asyncio.sleep(0.05)

    async def _try(self, request: Request, plan: Plan | None, stream: DeltaStream) -> None:
        assert self._served is not None
        assert self._networks is not None
        assert self._text is not None
        extra = None
        if plan is not None or request.probes:
            await self._networks.teach(readers_of(plan, request.probes))
            marks = self._served.marks_for(plan)
            extra = {KEY: packed_request(plan, request.probes, marks=marks)}
        inbox = INBOXES[request.id] = Inbox()
        served = self._served
        answer = Answer(request, inbox, served.info.tokenizer, marks=served.marks, text=self._text)
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids)}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        outputs = self._llm.generate(
            prompt,
            vllm_params(request, extra_args=extra),
            request.id,
        )
        try:
            async for output in outputs:
                delta = answer.delta(output)
                if delta is not None:
                    if delta.finish_reason is not None and extra is not None:
                        await self._ask_all(request)
                    stream.put(delta)
                    if delta.finish_reason is not None:
                        return
        finally:
            # Closing it aborts what still runs in vLLM, before our places are given back.
            with suppress(Exception):
                await outputs.aclose()
            INBOXES.pop(request.id, None)
        raise EngineError("vLLM ended a sequence without saying why.")

    async def _ask_all(self, request: Request) -> None:
        """Let an answer end well only if every worker steered it.

        Raises:
            EngineError: a worker gave up on the request.
        """
        assert self._served is not None
        why = await failure_on_any(self._llm, request.id, n_workers=self._served.n_workers)
        if why is not None:
            raise EngineError(f"The engine failed on this request: {why}")

    # --- places in the workers' banks

    async def _enter(self, plan: Plan) -> None:
        """Wait for room in the bank, first come first served."""
        assert self._room is not None
        if not self._in_line and self._room.take(plan):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_line.append((plan, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(plan)
            else:
                self._in_line.remove((plan, turn))
                self._call_next()
            raise

    def _leave(self, plan: Plan) -> None:
        assert self._room is not None
        self._room.give_back(plan)
        self._call_next()

    def _call_next(self) -> None:
        assert self._room is not None
        while self._in_line:
            plan, turn = self._in_line[0]
            if turn.cancelled():
                self._in_line.popleft()
                continue
            if not self._room.take(plan):
                return
            self._in_line.popleft()
            turn.set_result(None)


def _launched(source: str, options: dict[str, Any]) -> Any:
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ModelLoadError(
            f"--engine vllm needs vLLM, which is not to be had here ({error}): pip install vllm."
        ) from error
    from trimtab.serving.engines.vllm.plugin import register

    register()

    class Engine(AsyncLLM):
        """Ended by `VllmEngine.stop`; its own destructor fails at the interpreter's end."""

        def __del__(self) -> None:
            pass

    options.setdefault("enable_log_requests", False)
    if current_platform.is_cpu():
        options.setdefault("gpu_memory_utilization", _CPU_SHARE)
    return Engine.from_engine_args(AsyncEngineArgs(model=source, **options))

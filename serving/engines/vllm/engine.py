"""The vLLM engine: the same contract as the embedded one, over vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.serving.detokenizer import TokenText
from trimtab.serving.engines.base import (
    ContextLengthError,
    Delta,
    EngineError,
    EngineInfo,
    EngineStats,
    ModelAccess,
    OverloadedError,
    Request,
)
from trimtab.serving.engines.delta_stream import DeltaStream
from trimtab.serving.engines.vllm.answer import Answer, SplitPromptFailure
from trimtab.serving.engines.vllm.plan_wire import (
    KEY,
    packed_network,
    packed_request,
    readers_of,
)
from trimtab.serving.engines.vllm.reports import INBOXES, Inbox, steps_seen
from trimtab.serving.engines.vllm.sampling import vllm_params
from trimtab.serving.engines.vllm.support import Support
from trimtab.steering.bank_room import BankRoom, Needs, check_fits
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import located
from trimtab.steering.model.profile import ref_without_weights, sample_ids
from trimtab.steering.plan import Plan, Reader
from trimtab.steering.thinking import ThinkingMarks

logger = logging.getLogger(__name__)

# Networks we know the workers to have; they keep twice as many (`worker_steering.KEPT_NETWORKS`).
_TAUGHT = 128
# Tries of a request whose gate needs its prompt whole, while the scheduler splits it.
_TRIES = 100


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
        self._info: EngineInfo | None = None
        self._llm: Any = None
        self._marks: ThinkingMarks | None = None
        self._text: TokenText | None = None
        self._support: Support | None = None
        self._room: BankRoom | None = None
        self._max_running = 0
        self._live: dict[str, asyncio.Task[None]] = {}
        self._in_line: deque[tuple[Plan, asyncio.Future[None]]] = deque()
        self._taught: OrderedDict[str, asyncio.Task[None]] = OrderedDict()

    # --- contract

    @property
    def info(self) -> EngineInfo:
        """Facts about the model; valid once `start` has returned."""
        if self._info is None:
            raise EngineError("The engine is still loading.")
        return self._info

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
        self._llm = await asyncio.to_thread(_launched, source, dict(self.config.options))
        llm_config = self._llm.vllm_config
        facts = await self._llm.collective_rpc("trimtab_facts")
        _check_layers(facts)
        one = facts[0]
        self._room = BankRoom(
            Needs(one["max_slots"], one["max_rows"], one["max_low_rank"], one["max_guides"])
        )
        self._support = Support.of(llm_config, facts)
        self._max_running = int(llm_config.scheduler_config.max_num_seqs)
        tokenizer = self._llm.get_tokenizer()
        self._marks = ThinkingMarks.of(tokenizer)
        self._text = TokenText(tokenizer)
        max_context = int(llm_config.model_config.max_model_len)
        vocab_size = int(llm_config.model_config.get_vocab_size())
        ids = sample_ids(tokenizer, vocab_size=vocab_size, max_context=max_context - 1)
        norms = await self._measured(ids, n_layers=one["n_layers"])
        ref = await asyncio.to_thread(ref_without_weights, source, model_id=name)
        self._info = EngineInfo(
            model=ref,
            tokenizer=tokenizer,
            hidden_norms=norms,
            max_context=max_context,
            has_thinking=self._marks is not None,
            choices={"model": reason, **self._support.sentences},
        )

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ContextLengthError: prompt plus max_tokens exceed the context.
            SpecError: the plan can never fit the bank, or this vLLM cannot do what it asks.
        """
        n, most = len(request.prompt_ids), self.info.max_context
        if n + max(request.sampling.max_tokens, 1) > most:
            raise ContextLengthError(
                f"The prompt has {n} tokens and max_tokens is {request.sampling.max_tokens}; "
                f"together they may be {most} at most.",
                param="max_tokens" if n < most else "messages",
            )
        assert self._room is not None
        assert self._support is not None
        if request.plan is not None:
            check_fits(request.plan, self._room.size)
        self._support.check(request)

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        """Queue requests together, all or none.

        Raises:
            OverloadedError: the queue has no room for all of them.
            EngineError: the engine is not running.
        """
        if self._info is None or self._llm is None or self._llm.errored:
            raise EngineError("The engine is not running.")
        room = self.config.max_queue + self._max_running
        load = len(self._live)
        if load + len(requests) > room:
            raise OverloadedError(
                f"{load} sequences run or wait and at most {room} may; try again shortly.",
                retry_after_s=max(1, load // max(1, self._max_running)),
            )
        for request in requests:
            self.check(request)
        return [self._started(request) for request in requests]

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
        extra = None
        if plan is not None or request.probes:
            await self._teach(readers_of(plan, request.probes))
            marks = self._marks if plan is not None and tells_thinking(plan) else None
            pair = None if marks is None else (marks.open, marks.close)
            extra = {KEY: packed_request(plan, request.probes, marks=pair)}
        assert self._text is not None
        inbox = INBOXES[request.id] = Inbox()
        answer = Answer(request, inbox, self.info.tokenizer, marks=self._marks, text=self._text)
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
                    stream.put(delta)
                    if delta.finish_reason is not None:
                        return
        finally:
            # Closing it aborts what still runs in vLLM, before our places are given back.
            with suppress(Exception):
                await outputs.aclose()
            INBOXES.pop(request.id, None)
        raise EngineError("vLLM ended a sequence without saying why.")

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

    # --- what the workers must know beforehand

    async def _teach(self, readers: Mapping[str, Reader]) -> None:
        """Put networks on the workers that are not there yet."""
        for digest, reader in readers.items():
            task = self._taught.get(digest)
            if task is None or (task.done() and (task.cancelled() or task.exception())):
                task = asyncio.create_task(self._send(digest, reader))
                self._taught[digest] = task
            self._taught.move_to_end(digest)
            await asyncio.shield(task)
        while len(self._taught) > _TAUGHT:
            self._taught.popitem(last=False)

    async def _send(self, digest: str, reader: Reader) -> None:
        packed = packed_network(reader.classifier)
        await self._llm.collective_rpc("trimtab_learn", args=(digest, packed))

    async def _measured(self, ids: Sequence[int], *, n_layers: int) -> torch.Tensor:
        """Run a text through the model and return the median |h| of each layer, `[n_layers]`.

        It goes the way of every steered request, so it also proves that all layers are armed.
        """
        from vllm import SamplingParams

        extra = {KEY: packed_request(None, measures=True)}
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args=extra)
        params.skip_reading_prefix_cache = True
        name = "trimtab-profile"
        INBOXES[name] = Inbox()
        try:
            async for _ in self._llm.generate({"prompt_token_ids": list(ids)}, params, name):
                pass
            inbox = INBOXES[name]
        finally:
            INBOXES.pop(name, None)
        if inbox.failure or not inbox.is_applied:
            raise ModelLoadError(
                f"Steering does not reach this model on vLLM: {inbox.failure or 'no report came'}."
            )
        return await self._norms(len(ids), n_layers=n_layers)

    async def _norms(self, n_tokens: int, *, n_layers: int) -> torch.Tensor:
        by_layer: dict[int, list[float]] = {}
        for _ in range(50):  # a request is let go of at the next step
            for rank in await self._llm.collective_rpc("trimtab_take_norms"):
                by_layer.update({layer: values for _, layer, values in rank})
            if len(by_layer) == n_layers:
                break
            await asyncio.sleep(0.05)
        short = [n for n in range(n_layers) if len(by_layer.get(n, ())) < n_tokens]
        if short:
            raise ModelLoadError(f"Steering does not reach layers {short} of this model on vLLM.")
        medians = [statistics.median_low(by_layer[n][1:n_tokens]) for n in range(n_layers)]
        return torch.tensor(medians, dtype=torch.float32).clamp_min(1e-6)


def tells_thinking(plan: Plan) -> bool:
    """Return whether a plan treats thinking spans unlike the rest of the answer."""
    return any(part.window.thinking != part.window.generation for part in plan.parts)


def _launched(source: str, options: dict[str, Any]) -> Any:
    try:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ModelLoadError(
            f"--engine vllm needs vLLM, which is not to be had here ({error}): "
            "pip install 'trimtab[vllm]'."
        ) from error
    from trimtab.serving.engines.vllm.plugin import register

    register()

    class Engine(AsyncLLM):
        """Ended by `VllmEngine.stop`; its own destructor fails at the interpreter's end."""

        def __del__(self) -> None:
            pass

    options.setdefault("enable_log_requests", False)
    return Engine.from_engine_args(AsyncEngineArgs(model=source, **options))


def _check_layers(facts: Sequence[Mapping[str, Any]]) -> None:
    armed = {layer for rank in facts for layer in rank["layers"]}
    missing = sorted(set(range(facts[0]["n_layers"])) - armed)
    if missing:
        raise ModelLoadError(f"Layers {missing} of this model were not found on any vLLM worker.")

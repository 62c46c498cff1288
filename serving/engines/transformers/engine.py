"""The embedded engine: any decoder-only Hugging Face model, batched continuously, on one thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from trimtab.attribution.subject import Subject
from trimtab.serving.detokenizer import Detokenizer, TokenText
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
from trimtab.serving.engines.transformers.batcher import Batcher
from trimtab.serving.engines.transformers.kv import KVRows, bytes_per_token
from trimtab.serving.engines.transformers.runner import (
    PackedRunner,
    Runner,
    SoloRunner,
    packing_problem,
)
from trimtab.serving.engines.transformers.sampler import SamplerState
from trimtab.serving.engines.transformers.sequence import Sequence
from trimtab.serving.engines.transformers.slices import SliceQueue
from trimtab.steering.bank import Bank
from trimtab.steering.model.decoder import text_config
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.memory import free_bytes
from trimtab.steering.model.profile import ModelProfile, profile_model
from trimtab.steering.thinking import ThinkingMarks

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Share of free memory the cache may reserve when no size is given.
_CACHE_SHARE = 0.3


@dataclass(frozen=True)
class EngineConfig:
    """Size of the embedded engine.

    Attributes:
        max_concurrent: sequences that run at once.
        max_queue: sequences that may wait; more are refused with 429.
        max_slots: live distinct steering parts.
        cache_bytes: memory for keys and values; None takes 30 % of what is free.
        slice_share: most of the model's time that slices get while sequences run.
    """

    max_concurrent: int = 32
    max_queue: int = 256
    max_slots: int = 256
    cache_bytes: int | None = None
    slice_share: float = 0.5


class TransformersEngine:
    """Serves a model loaded by transformers.

    The model runs on a thread of its own; the event loop only queues requests and hands out
    deltas. See `Engine` for the contract.

    Args:
        load: loads the model; called on the engine's thread by `start`.
        config: sizes.
    """

    def __init__(
        self, load: Callable[[], LoadedModel], *, config: EngineConfig | None = None
    ) -> None:
        self._load = load
        self.config = config or EngineConfig()
        self._info: EngineInfo | None = None
        self._batcher: Batcher | None = None
        self._marks: ThinkingMarks | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._outbox: list[tuple[DeltaStream, Delta | Exception]] = []
        self._slices = SliceQueue(share=self.config.slice_share)
        self._subject: Subject | None = None
        self.loaded: LoadedModel | None = None
        self.profile: ModelProfile | None = None
        self.bank: Bank | None = None

    # --- contract

    @property
    def info(self) -> EngineInfo:
        """Facts about the model; valid once `start` has returned."""
        if self._info is None:
            raise EngineError("The engine is still loading.")
        return self._info

    async def start(self) -> None:
        """Load the model on the engine's thread and begin serving.

        Raises:
            ModelLoadError: the model cannot be loaded or steered.
        """
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._serve, args=(ready,), name="trimtab-engine", daemon=True
        )
        self._thread.start()
        await ready

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ContextLengthError: prompt plus max_tokens exceed the context.
            SpecError: the plan can never fit the bank.
        """
        check_context(request, most=self.info.max_context)
        if request.plan is not None and self.bank is not None:
            self.bank.check_fits(request.plan)

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        """Queue requests together, all or none.

        Raises:
            OverloadedError: the queue has no room for all of them.
            EngineError: the engine is not running.
        """
        batcher = self._batcher
        if batcher is None or self._stopping:
            raise EngineError("The engine is not running.")
        check_queue(
            len(requests),
            load=len(batcher.waiting) + len(batcher.running),
            max_running=self.config.max_concurrent,
            max_queue=self.config.max_queue,
        )
        for request in requests:
            self.check(request)
        queued = [self._queued(request) for request in requests]
        batcher.submit([sequence for sequence, _ in queued])
        with self._wake:
            self._wake.notify()
        return [stream for _, stream in queued]

    @property
    def model_access(self) -> ModelAccess | None:
        """The model in process; None while it loads and once it is stopped."""
        if self.loaded is None or self._subject is None:
            return None
        return ModelAccess(self.loaded, self._subject, self._run_slice)

    def _run_slice(self, work: Callable[[], T]) -> T:
        future = self._slices.submit(work)
        with self._wake:
            self._wake.notify()
        return future.result()

    @property
    def is_alive(self) -> bool:
        """False once the model's thread has ended."""
        return self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Return the load now."""
        batcher, bank = self._batcher, self.bank
        if batcher is None or bank is None:
            return EngineStats(0, 0, 0, 0, 0)
        return EngineStats(
            running=len(batcher.running),
            waiting=len(batcher.waiting),
            slots_used=bank.n_live,
            slots_total=bank.max_slots,
            steps=batcher.n_steps,
        )

    async def stop(self) -> None:
        """Cancel what runs, end the thread and free the model."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self.loaded = self.profile = self.bank = self._batcher = self._subject = None

    # --- engine thread

    def _serve(self, ready: asyncio.Future[None]) -> None:
        assert self._loop is not None
        try:
            # Not in inference mode: tensors made there could never take part in a gradient, and
            # attribution runs on this model and bank.
            with torch.no_grad():
                self._prepare()
        except BaseException as error:
            self._loop.call_soon_threadsafe(ready.set_exception, error)
            return
        self._loop.call_soon_threadsafe(ready.set_result, None)
        batcher = self._batcher
        assert batcher is not None
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._stopping or batcher.has_work() or self._slices):
                        self._wake.wait()
                if self._stopping:
                    break
                if batcher.has_work():
                    began = time.perf_counter()
                    batcher.step()
                    self._deliver()
                    self._slices.stepped(time.perf_counter() - began)
                self._slices.run_next(is_busy=batcher.has_work())
            self._slices.close()
            batcher.clear()
            self._deliver()

    def _prepare(self) -> None:
        loaded = self._load()
        profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
        bank = Bank(
            n_layers=len(profile.layers),
            hidden_size=profile.ref.hidden_size,
            device=loaded.device,
            max_slots=self.config.max_slots,
        )
        choices = dict(loaded.reasons)
        runner, max_context = self._runner(loaded, profile, bank, choices)
        ends = _end_ids(loaded)
        self._marks = ThinkingMarks.of(loaded.tokenizer)
        self._batcher = Batcher(
            runner,
            bank=bank,
            n_rows=self.config.max_concurrent,
            end_ids=ends,
            text=TokenText(loaded.tokenizer),
            fail=lambda sequence, error: sequence.emit(error),  # type: ignore[arg-type]
        )
        self._subject = Subject(loaded, profile)
        self.loaded, self.profile, self.bank = loaded, profile, bank
        self._info = EngineInfo(
            model=profile.ref,
            tokenizer=loaded.tokenizer,
            hidden_norms=profile.hidden_norms,
            max_context=max_context,
            has_thinking=self._marks is not None,
            choices=choices,
        )

    def _runner(
        self,
        loaded: LoadedModel,
        profile: ModelProfile,
        bank: Bank,
        choices: dict[str, str],
    ) -> tuple[Runner, int]:
        config = text_config(loaded.model)
        n_rows = self.config.max_concurrent
        budget = self.config.cache_bytes or int(_CACHE_SHARE * free_bytes(loaded.device))
        per_token = bytes_per_token(config, loaded.dtype)
        fits = max(256, budget // (per_token * n_rows))
        context = min(profile.max_context, fits)
        kv = KVRows(n_rows=n_rows, max_tokens=context)
        packed = PackedRunner(loaded.model, profile.layers, bank=bank, kv=kv)
        problem = packing_problem(packed)
        if problem is None:
            choices["batching"] = (
                f"packed: up to {n_rows} sequences in one forward pass; checked against the "
                "model's own logits"
            )
            choices["context"] = f"{context} tokens a sequence"
            if context < profile.max_context:
                choices["context"] += (
                    f" of the model's {profile.max_context}: {budget / 2**30:.1f} GiB of cache "
                    f"hold {n_rows} such sequences"
                )
            return packed, context
        choices["batching"] = f"one sequence at a time: {problem}"
        choices["context"] = f"{profile.max_context} tokens a sequence"
        return SoloRunner(loaded.model, profile.layers, bank=bank), profile.max_context

    def _queued(self, request: Request) -> tuple[Sequence, DeltaStream]:
        stream = DeltaStream(lambda: self._cancel(sequence))
        sequence = Sequence(
            request,
            lambda item: self._outbox.append((stream, item)),
            Detokenizer(self.info.tokenizer, stop=request.sampling.stop),
            SamplerState.of(request.sampling, request.prompt_ids),
            self._marks,
        )
        return sequence, stream

    def _deliver(self) -> None:
        """Hand a step's deltas to the event loop in one call."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_hand_out, outbox)
        except RuntimeError:
            logger.debug("the event loop is gone; %d deltas dropped", len(outbox))

    def _cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        with self._wake:
            self._wake.notify()


def _hand_out(outbox: list[tuple[DeltaStream, Delta | Exception]]) -> None:
    for stream, item in outbox:
        stream.put(item)


def _end_ids(loaded: LoadedModel) -> frozenset[int]:
    generation = getattr(loaded.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ids = {ends} if isinstance(ends, int) else set(ends or ())
    own = getattr(loaded.tokenizer, "eos_token_id", None)
    return frozenset(ids | ({own} if isinstance(own, int) else set()))

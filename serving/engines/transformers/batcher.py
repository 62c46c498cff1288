"""Continuous batching: sequences join and leave at every token, each with its own steering."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from trimtab.serving.detokenizer import TokenText
from trimtab.serving.engines.base import Delta, EngineError, FinishReason
from trimtab.serving.engines.transformers.runner import Chunk, Runner
from trimtab.serving.engines.transformers.sampler import choose, token_logprobs
from trimtab.serving.engines.transformers.sequence import Sequence
from trimtab.steering.bank import Bank

logger = logging.getLogger(__name__)

# Prompt tokens run beside decoding sequences in one step. Larger prefills faster and makes the
# others wait longer: 256 tokens take about 0.2 s for a 135M model on two CPU cores.
PREFILL_TOKENS = 256
# With nobody waiting for a next token, a prompt may take more at once.
IDLE_PREFILL_TOKENS = 2048


class Batcher:
    """The scheduling loop. `step` runs on one thread; `submit` and `cancel` come from any.

    Args:
        runner: runs the chunks of a step.
        bank: holds the live plans.
        n_rows: sequences that run at once.
        end_ids: tokens that end a sequence.
        text: text of a single token.
        fail: takes a sequence and the error that ended it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        bank: Bank,
        n_rows: int,
        end_ids: frozenset[int],
        text: TokenText,
        fail: Callable[[Sequence, Exception], None],
    ) -> None:
        self.runner = runner
        self.bank = bank
        self.n_rows = n_rows
        self.end_ids = end_ids
        self.text = text
        self.fail = fail
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_steps = 0
        self._lock = threading.Lock()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences, first come first served."""
        with self._lock:
            self.waiting.extend(sequences)

    def has_work(self) -> bool:
        """True if a step would do something."""
        return bool(self.running or self.waiting)

    def step(self) -> None:
        """Admit, run one forward pass, choose tokens, let finished sequences go."""
        self._drop_cancelled()
        self._admit()
        planned = self._plan()
        if not planned:
            return
        self.n_steps += 1
        done, failed = self._run(planned)
        for sequence, chunk, _ in done:
            sequence.done += len(chunk.ids)
        for sequence, error in failed:
            self._leave(sequence, error=error)
        for sequence, chunk, logits in done:
            try:
                self._score_prompt(sequence, chunk, logits)
            except Exception as error:  # one request's trouble must stay its own
                self._leave(sequence, error=error)
        self._choose([(s, x) for s, _, x in done if s.row >= 0 and s.done == len(s.ids)])

    # --- joining

    def _drop_cancelled(self) -> None:
        with self._lock:
            dropped = [s for s in self.waiting if s.cancelled]
            if dropped:
                self.waiting = deque(s for s in self.waiting if not s.cancelled)
        for sequence in dropped:
            sequence.end(FinishReason.CANCELLED)
        for sequence in [s for s in self.running if s.cancelled]:
            self._leave(sequence, reason=FinishReason.CANCELLED)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.n_rows:
            sequence = self.waiting[0]
            plan = sequence.request.plan
            lease = None
            if plan is not None:
                lease = self.bank.acquire(plan)
                if lease is None:
                    return  # it waits for slots; overtaking it could starve it
            with self._lock:
                self.waiting.popleft()
            for reader in sequence.request.probes:
                self.bank.readers.hold(reader)
            sequence.hold(len(self.running), lease)
            self.running.append(sequence)

    # --- one pass

    def _plan(self) -> list[tuple[Sequence, Chunk]]:
        decoding = [s for s in self.running if s.is_decoding]
        planned = [(s, s.chunk(1)) for s in decoding]
        budget = PREFILL_TOKENS if decoding else IDLE_PREFILL_TOKENS
        for sequence in self.running:
            if sequence.is_decoding:
                continue
            plan = sequence.request.plan
            whole = not self.runner.can_chunk or (plan is not None and plan.needs_whole_prompt)
            chunk = sequence.chunk(sequence.n_prompt if whole else budget)
            planned.append((sequence, chunk))
            budget -= len(chunk.ids)
            if budget <= 0:
                break
        return planned

    def _run(
        self, planned: list[tuple[Sequence, Chunk]]
    ) -> tuple[list[tuple[Sequence, Chunk, torch.Tensor]], list[tuple[Sequence, Exception]]]:
        try:
            logits = self.runner.run([chunk for _, chunk in planned])
            return [(s, c, x) for (s, c), x in zip(planned, logits, strict=True)], []
        except Exception as error:  # find whose fault it is; the others go on
            logger.warning("step failed (%s); running its %d sequences alone", error, len(planned))
        done, failed = [], []
        for sequence, chunk in planned:
            try:
                (own,) = self.runner.run([chunk])
                done.append((sequence, chunk, own))
            except Exception as error:
                failed.append((sequence, error))
        return done, failed

    def _score_prompt(self, sequence: Sequence, chunk: Chunk, logits: torch.Tensor) -> None:
        top = sequence.request.sampling.prompt_logprobs
        if top is None or chunk.start >= sequence.n_prompt:
            return
        if chunk.start == 0:
            sequence.prompt_logprobs.append(None)
        following = sequence.ids[chunk.start + 1 : chunk.start + 1 + len(chunk.ids)]
        following = following[: max(0, sequence.n_prompt - 1 - chunk.start)]
        if following:
            scored = token_logprobs(logits[: len(following)], following, top=top, text=self.text)
            sequence.prompt_logprobs.extend(scored)

    # --- choosing

    def _choose(self, ready: list[tuple[Sequence, torch.Tensor]]) -> None:
        scoring = [s for s, _ in ready if s.request.sampling.max_tokens == 0]
        for sequence in scoring:
            self._leave(sequence, reason=FinishReason.LENGTH, **_first_delta(sequence))
        ready = [(s, x) for s, x in ready if s.row >= 0]
        if not ready:
            return
        logits = torch.cat([x[-1:] for _, x in ready])
        finite = logits.amax(-1).isfinite().tolist()
        try:
            tokens = choose(logits, [s.sampler for s, _ in ready])
        except Exception as error:
            for sequence, _ in ready:
                self._leave(sequence, error=error)
            return
        for i, (sequence, _) in enumerate(ready):
            try:
                if not finite[i]:
                    raise ArithmeticError("the model's logits are not finite")
                self._advance(sequence, tokens[i], logits[i : i + 1])
            except Exception as error:
                self._leave(sequence, error=error)

    def _advance(self, sequence: Sequence, token: int, logits: torch.Tensor) -> None:
        params = sequence.request.sampling
        more: dict[str, Any] = _first_delta(sequence) if sequence.n_generated == 0 else {}
        if params.logprobs is not None:
            more["logprobs"] = tuple(
                token_logprobs(logits, [token], top=params.logprobs, text=self.text)
            )
        if sequence.watch is not None:
            more["probes"] = (tuple(tuple(row) for row in sequence.watch.latest),)
        sequence.accept(token)
        reason, stop_reason = self._ending(sequence, token)
        text = ""
        if reason is not FinishReason.STOP:
            text = sequence.detokenizer.push(token)
            if sequence.detokenizer.stopped_by is not None:
                reason, stop_reason = FinishReason.STOP, sequence.detokenizer.stopped_by
        more["token_ids"] = (token,)
        if reason is None:
            sequence.emit(Delta(text=text, **more))
            return
        text += sequence.detokenizer.finish()
        if sequence.detokenizer.stopped_by is not None:  # perhaps only in what was held back
            reason, stop_reason = FinishReason.STOP, sequence.detokenizer.stopped_by
        self._leave(sequence, reason=reason, text=text, stop_reason=stop_reason, **more)

    def _ending(
        self, sequence: Sequence, token: int
    ) -> tuple[FinishReason | None, str | int | None]:
        params = sequence.request.sampling
        if token in self.end_ids and not params.ignore_eos:
            return FinishReason.STOP, None
        if token in params.stop_token_ids:
            return FinishReason.STOP, token
        if sequence.n_generated >= params.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    # --- leaving

    def _leave(
        self,
        sequence: Sequence,
        *,
        reason: FinishReason | None = None,
        error: Exception | None = None,
        **more: Any,
    ) -> None:
        """Take a sequence out of the batch and close the gap it leaves in the cache."""
        row, last = sequence.row, self.running[-1]
        # A failed step may have written the chunk it failed on; nothing longer than the prompt or
        # one token beyond what is done.
        n_written = max(sequence.done + 1, sequence.n_prompt)
        self.runner.free(row, n_written, is_broken=error is not None)
        if last is not sequence:
            self.runner.move(last.row, row, last.done)
            last.row = row
            self.running[row] = last
        self.running.pop()
        sequence.row = -1
        if sequence.lease is not None:
            self.bank.release(sequence.lease)
            sequence.lease = None
        for reader in sequence.request.probes:
            self.bank.readers.drop(reader)
        if error is not None:
            logger.error("request %s failed", sequence.request.id, exc_info=error)
            self.fail(sequence, EngineError(f"The engine failed on this request: {error}"))
        elif reason is not None:
            sequence.end(reason, **more)

    def clear(self) -> None:
        """End everything, for shutdown."""
        for sequence in [*self.running, *self.waiting]:
            sequence.cancelled = True
        self._drop_cancelled()


def _first_delta(sequence: Sequence) -> dict[str, Any]:
    if sequence.request.sampling.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": tuple(sequence.prompt_logprobs)}

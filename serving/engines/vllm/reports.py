"""Reports on the way from a worker to the app, beside the tokens they belong to.

A worker's output, the scheduler's and the frontend's are three objects in up to three processes.
A report rides on the first as an attribute, on the second in `kv_transfer_params` (the one field
that takes any dict), and is lifted off in the frontend before anybody else sees it. So it arrives
with its token or not at all, and a request that failed in a worker ends before its token counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import Counts, counts_of

ATTRIBUTE = "trimtab_reports"
"""Name of the attribute on a model runner's output: request id -> report."""

FIELD = "trimtab"
"""Key in `kv_transfer_params`."""


@dataclass
class Inbox:
    """What has been reported about one request so far, in the app's process.

    Attributes:
        is_applied: whether a worker has said that the steering ran.
        counts: of a gated plan, by how many of its sequence's tokens have been run.
        latched: decision of each per-prompt gate, by part index.
        probes: what the probes read, one entry a token that has not been collected.
        failure: why a worker gave up on it.
    """

    is_applied: bool = False
    counts: dict[int, Counts] = field(default_factory=dict)
    latched: dict[int, float] = field(default_factory=dict)
    probes: list[list[list[float]]] = field(default_factory=list)
    failure: str | None = None

    def take(self, report: dict[str, Any]) -> None:
        """Add a report."""
        self.is_applied |= bool(report.get("applied"))
        self.failure = report.get("failed", self.failure)
        for n_tokens, packed in report.get("counts", ()):
            counts = self.counts[n_tokens] = Counts.unpacked(packed)
            self.latched.update(counts.latched)
        if "probes" in report:
            self.probes.append(report["probes"])

    def counts_at(self, n_tokens: int) -> Counts | None:
        """Return the counts after `n_tokens` tokens and forget earlier ones."""
        for n in [n for n in self.counts if n < n_tokens]:
            del self.counts[n]
        return self.counts.get(n_tokens)

    def account(
        self, plan: Plan, *, n_prompt: int, n_tokens: int, thinking: np.ndarray | None = None
    ) -> Counts | None:
        """Return what was steered among the first `n_tokens`, None if no worker vouches for it.

        Args:
            plan: the request's.
            n_prompt: length of its prompt in tokens.
            n_tokens: tokens run.
            thinking: whether each lies in a thinking span, `[n_tokens]`, bool; None means no.
        """
        if not plan.parts:
            return Counts(0, (), (), {})
        gates = {i: part.gate for i, part in enumerate(plan.parts) if part.gate is not None}
        if not self.is_applied:
            return None
        if any(not gate.per_prompt for gate in gates.values()):
            return self.counts_at(n_tokens)
        # Once decided a gate holds for every token, so these are counted here.
        if not set(gates) <= set(self.latched):
            return None
        return counts_of(
            plan, n_prompt=n_prompt, n_tokens=n_tokens, thinking=thinking, latched=self.latched
        )


INBOXES: dict[str, Inbox] = {}
"""Inboxes of this process's running requests, by the id their sender gave them."""

INBOX = "trimtab_inbox"
"""Attribute of vLLM's own record of a request that has its inbox there (`plain_answers.py`)."""


class Pending:
    """Reports in the scheduler's process that wait for their request's next output."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Any]] = {}

    def update(
        self, scheduler: Any, scheduled: Any, output: Any, original: Callable[..., Any]
    ) -> Any:
        """Stand in for `Scheduler.update_from_output`."""
        reports = getattr(output, ATTRIBUTE, None)
        if reports is None and not self._held:
            return original(scheduler, scheduled, output)
        failed = {}
        for name, report in (reports or {}).items():
            self._held.setdefault(name, {}).update(report)
            if "failed" in report:
                failed[name] = report["failed"]
        ended = _end_failed(scheduler, failed)
        outputs = original(scheduler, scheduled, output)
        self._attach(outputs)
        _say_ended(outputs, ended, failed)
        for name in [n for n in self._held if n not in scheduler.requests]:
            del self._held[name]
        return outputs

    def _attach(self, outputs: Any) -> None:
        for group in outputs.values():
            for one in group.outputs:
                report = self._held.pop(one.request_id, None)
                if report is not None:
                    one.kv_transfer_params = {**(one.kv_transfer_params or {}), FIELD: report}


def _end_failed(scheduler: Any, failed: dict[str, str]) -> list[Any]:
    if not failed:
        return []
    from vllm.v1.request import RequestStatus

    for name in failed:
        _forget_blocks(scheduler, name)
    ended: list[Any] = scheduler.finish_requests(set(failed), RequestStatus.FINISHED_ERROR)
    return ended


def _forget_blocks(scheduler: Any, name: str) -> None:
    """Take a failed request's blocks out of the prefix cache.

    They are known there as steered and may not be: whoever asks for the same again would read them.
    """
    if name in scheduler.requests:
        cache = scheduler.kv_cache_manager
        cache.evict_blocks({block for group in cache.get_block_ids(name) for block in group})


def _say_ended(outputs: Any, ended: list[Any], failed: dict[str, str]) -> None:
    if not ended:
        return
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request in ended:
        group = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
        why = failed[request.request_id]
        group.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=f"steering failed: {why}",
                kv_transfer_params={FIELD: {"failed": why}},
            )
        )


_n_steps = 0


def steps_seen() -> int:
    """Return how many steps' outputs have arrived in this process."""
    return _n_steps


def lift_off(processor: Any, outputs: list[Any]) -> None:
    """Take the reports off outputs that have arrived in the app's process."""
    global _n_steps
    _n_steps += bool(outputs)
    for one in outputs:
        if one.kv_transfer_params is None:
            continue
        report = one.kv_transfer_params.pop(FIELD, None)
        if report is None:
            continue
        one.kv_transfer_params = one.kv_transfer_params or None
        state = processor.request_states.get(one.request_id)
        if state is None:
            continue
        inbox = getattr(state, INBOX, None) or INBOXES.get(state.external_req_id)
        if inbox is not None:
            inbox.take(report)


async def failure_on_any(llm: Any, request_id: str, *, n_workers: int) -> str | None:
    """Return why any worker gave up on a request, None if none did.

    Reports ride on the output of one worker; of several, the others have to be asked.

    Args:
        llm: a running `AsyncLLM`.
        request_id: the id it was given.
        n_workers: how many workers it has.
    """
    if n_workers == 1:
        return None
    for why in await llm.collective_rpc("trimtab_failure_of", args=(request_id,)):
        if why is not None:
            # Its blocks are in the prefix cache as steered ones, and need not be.
            await llm.reset_prefix_cache()
            return str(why)
    return None

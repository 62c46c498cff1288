"""Steering inside one vLLM worker: the bank, the live requests, and the step that runs.

The runner's hooks tell it which requests came, went and are in the batch (`runner_hooks.py`); the
armed layers hand it their hidden states (`armed_layers.py`); what it has to say goes back with the
step's output (`reports.py`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from trimtab.kernels import Classifier, shift
from trimtab.serving.engines.vllm.live_request import BatchRow, LiveRequest, Tokens, check_shapes
from trimtab.serving.engines.vllm.plan_wire import KEY, unpacked_network, unpacked_request
from trimtab.steering.bank import Bank
from trimtab.steering.plan import MAX_PARTS
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Shift, Span, SteerStep
from trimtab.steering.step_planner import StepPlanner

logger = logging.getLogger(__name__)

# Classifiers' networks a worker keeps beyond those that running requests hold, last used first out.
KEPT_NETWORKS = 256
# Failures a worker remembers of requests that have ended.
_KEPT_FAILURES = 1024


class WorkerSteering:
    """The steering of one worker.

    Args:
        layers: decoder layers that this worker has and that are armed.
        n_layers: decoder layers of the whole model.
        hidden_size: width of the residual stream.
        device: the worker's.
        max_requests: requests that run at once.
    """

    def __init__(
        self,
        *,
        layers: Iterable[int],
        n_layers: int,
        hidden_size: int,
        device: torch.device | str,
        max_requests: int,
    ) -> None:
        self.layers = frozenset(layers)
        self.n_layers = n_layers
        self.hidden_size = hidden_size
        self.bank = Bank(
            n_layers=n_layers,
            hidden_size=hidden_size,
            device=device,
            max_slots=MAX_PARTS * max_requests,
            max_rows=max_requests * n_layers,
        )
        self.step: SteerStep | None = None
        self._planner = StepPlanner(self.bank)
        self.n_steered_steps = 0
        self.n_preempted = 0
        self._live: dict[str, LiveRequest] = {}
        self._failed: dict[str, str] = {}
        self._past_failures: OrderedDict[str, str] = OrderedDict()
        self._rows: Sequence[BatchRow] = ()
        self._talking: list[tuple[BatchRow, LiveRequest]] = []
        self._measures = False
        self._visited: set[int] = set()
        self._wanted: frozenset[int] = frozenset()
        self._measured: dict[str, dict[int, list[float]]] = {}
        self._networks: OrderedDict[str, Classifier] = OrderedDict()

    # --- requests

    def admit(self, request_id: str, extra_args: dict[str, Any], prompt_ids: Tokens) -> None:
        """Take a new request's steering in; whatever is wrong with it ends that request alone."""
        try:
            carried = extra_args.get(KEY)
            if carried is None:
                raise ValueError("its steering came to the engine uncompiled")
            read = unpacked_request(carried, self._network)
            check_shapes(read, n_layers=self.n_layers, hidden_size=self.hidden_size)
            live = LiveRequest.of(read, prompt_ids)
            for probe in read.probes:
                self.bank.readers.hold(probe)
        except Exception as error:  # a request's trouble is its own
            self._fail(request_id, error)
            return
        self._live[request_id] = live

    def forget(self, request_id: str) -> None:
        """Let a finished request go."""
        self._failed.pop(request_id, None)
        live = self._live.pop(request_id, None)
        if live is None:
            return
        self._yield_slots(live)
        for probe in live.carried.probes:
            self.bank.readers.drop(probe)
        if live.carried.measures:
            self._measured[request_id] = live.norms

    def preempt(self, request_id: str) -> None:
        """Give a preempted request's slots to others; it takes new ones when it resumes."""
        live = self._live.get(request_id)
        if live is not None:
            self.n_preempted += 1
            self._yield_slots(live)

    def _yield_slots(self, live: LiveRequest) -> None:
        if live.request is not None and self.bank.holds(live.request.lease):
            self.bank.release(live.request.lease)

    def _take_slots(self, live: LiveRequest) -> None:
        plan = live.carried.plan
        if plan is None or (live.request is not None and self.bank.holds(live.request.lease)):
            return
        lease = self.bank.acquire(plan)
        if lease is None:
            raise RuntimeError("the steering bank is full")
        if live.request is None:
            live.request = SteeredRequest(lease, live.n_prompt)
        else:
            live.request.lease = lease  # its gates' decisions stay

    def _fail(self, request_id: str, error: Exception) -> None:
        logger.warning("request %s cannot be steered", request_id, exc_info=error)
        why = f"{type(error).__name__}: {error}"
        self._failed[request_id] = self._past_failures[request_id] = why
        while len(self._past_failures) > _KEPT_FAILURES:
            self._past_failures.popitem(last=False)

    # --- one forward pass

    @property
    def is_idle(self) -> bool:
        """True if no live request is steered or read."""
        return not (self._live or self._failed)

    def begin(self, rows: Sequence[BatchRow]) -> None:
        """Plan a forward pass.

        Args:
            rows: the batch in the order of its tokens; requests that are not steered too.
        """
        self.step = None
        self._visited.clear()
        self._wanted = frozenset()
        self._talking = []
        self._rows = ()
        if not self._live:
            return
        spans = [self._span(row) for row in rows]
        self._measures = any(live.carried.measures for _, live in self._talking)
        if not self._measures and all(span.is_plain for span in spans):
            return
        self._rows = rows
        try:
            self.step = self._planner.step(spans)
        except Exception:
            self.step = self._careful_step(rows, spans)
        wanted = frozenset(range(self.n_layers)) if self._measures else self.step.layers
        self._wanted = wanted & self.layers
        self.n_steered_steps += 1

    def _span(self, row: BatchRow) -> Span:
        live = self._live.get(row.id)
        if live is None or row.id in self._failed:
            return Span(row.n_tokens, row.start)
        if live.has_to_tell:
            self._talking.append((row, live))
        try:
            self._take_slots(live)
            return live.span(row)
        except Exception as error:
            self._fail(row.id, error)
            return Span(row.n_tokens, row.start)

    def _careful_step(self, rows: Sequence[BatchRow], spans: list[Span]) -> SteerStep:
        """Find whose span cannot be planned; the others go on."""
        good = []
        for row, span in zip(rows, spans, strict=True):
            try:
                SteerStep(self.bank, [span])
                good.append(span)
            except Exception as error:
                self._fail(row.id, error)
                good.append(Span(row.n_tokens, row.start))
        return SteerStep(self.bank, good)

    def at_layer(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Steer a layer's output in place.

        The residual stream is `hidden + residual`, both `[n_tokens or more, d_model]`. A steered
        token's new state goes whole into `hidden` and its residual becomes 0, so that nothing is
        lost by subtracting; other tokens keep every bit.
        """
        step = self.step
        if step is None or layer not in self._wanted:
            return
        self._visited.add(layer)
        try:
            n = step.n_tokens
            hidden = hidden[:n]
            residual = None if residual is None else residual[:n]
            only = None if self._measures else step.shift(layer)
            if only is not None:
                _shift_stream(hidden, residual, only)
            else:
                self._steer_stream(layer, hidden, residual, step)
        except Exception as error:  # the step's plain requests must not suffer
            self._fail_step(error)

    def _steer_stream(
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None, step: SteerStep
    ) -> None:
        if not self._measures and step.steer_stream(layer, hidden, residual):
            return
        stream = _stream(hidden, residual)
        if self._measures:
            self._measure(layer, stream)
        if layer not in step.layers:
            return
        changed = step.apply(layer, stream)
        touched = step.touched(layer)
        if touched is None:
            hidden.copy_(changed)
            if residual is not None:
                residual.zero_()
        elif len(touched):
            hidden.index_copy_(0, touched, changed.index_select(0, touched).to(hidden.dtype))
            if residual is not None:
                residual.index_fill_(0, touched, 0)

    def _measure(self, layer: int, states: torch.Tensor) -> None:
        at = 0
        for row in self._rows:
            live = self._live.get(row.id)
            if live is not None and live.carried.measures:
                norms = states[at : at + row.n_tokens].norm(dim=-1)
                live.norms.setdefault(layer, []).extend(norms.tolist())
            at += row.n_tokens

    def _fail_step(self, error: Exception) -> None:
        for row in self._rows:
            live = self._live.get(row.id)
            if live is not None and (live.watch or (live.request and live.request.lease.slots)):
                self._fail(row.id, error)
        self.step = None

    def end(self, sampled: dict[str, int] | None = None) -> dict[str, dict[str, Any]]:
        """Close a forward pass and return what there is to tell of its requests, by id.

        Args:
            sampled: how many tokens each request got, to tell accepted drafts from rejected ones;
                None if the host does not know yet.

        A report holds some of: `applied` (once, its steering has run in every layer it names),
        `failed` (why it must end), `counts` (of a gated plan: after each sampled token, since the
        request may end at any of them), `probes` (of the last token).
        """
        reports: dict[str, dict[str, Any]] = {}
        if self.step is not None:
            try:
                self._finish(self.step)
                for row, live in self._talking:
                    n_sampled = None if sampled is None else sampled.get(row.id, 1)
                    reports[row.id] = live.report(row, n_sampled)
            except Exception as error:
                self._fail_step(error)
        for name, why in self._failed.items():
            reports[name] = {"failed": why}
        self.step = None
        self._rows = ()
        return reports

    def _finish(self, step: SteerStep) -> None:
        missed = self._wanted - self._visited
        if missed:
            raise RuntimeError(f"the pass missed the layers {sorted(missed)}")
        step.finish()

    # --- what the app may ask, beside requests

    def learn(self, digest: str, packed: dict[str, Any]) -> None:
        """Keep a classifier's network under its reader's digest."""
        self._networks[digest] = unpacked_network(packed)
        self._networks.move_to_end(digest)
        while len(self._networks) > KEPT_NETWORKS:
            self._networks.popitem(last=False)

    def _network(self, digest: str) -> Classifier:
        self._networks.move_to_end(digest)
        return self._networks[digest]

    def take_norms(self, name: str = "") -> dict[str, dict[int, list[float]]]:
        """Return and forget what measuring requests saw: id -> layer -> |h| of each token.

        Args:
            name: what their ids begin with.
        """
        mine = [request_id for request_id in self._measured if request_id.startswith(name)]
        return {request_id: self._measured.pop(request_id) for request_id in mine}

    def failure_of(self, name: str) -> str | None:
        """Return why this worker gave up on a request, ended or not; None if it did not.

        Args:
            name: what the app calls it; vLLM adds something to its end, and a choice's number
                to its beginning.
        """
        for one, why in self._past_failures.items():
            own = one.rpartition("-")[0]
            if name in (one, own, own.partition("_")[2]):
                return why
        return None

    def stats(self) -> dict[str, int]:
        """Return what is held, and how many steps were steered and requests preempted."""
        return {
            "requests": len(self._live),
            "slots_used": self.bank.n_live,
            "slots_total": self.bank.max_slots,
            "networks": len(self._networks),
            "readers": len(self.bank.readers),
            "steered_steps": self.n_steered_steps,
            "preempted": self.n_preempted,
        }


def _stream(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Return the residual stream in float32."""
    return hidden.float() if residual is None else hidden.float() + residual


def _shift_stream(hidden: torch.Tensor, residual: torch.Tensor | None, only: Shift) -> None:
    index = only.index
    if index is None:
        stream = _stream(hidden, residual)
        shift(stream, only.change, keeps_norm=only.keeps_norm, out=hidden)
        if residual is not None:
            residual.zero_()
        return
    mine = None if residual is None else residual.index_select(0, index)
    stream = _stream(hidden.index_select(0, index), mine)
    shifted = shift(stream, only.change, keeps_norm=only.keeps_norm)
    hidden.index_copy_(0, index, shifted.to(hidden.dtype))
    if residual is not None:
        residual.index_fill_(0, index, 0)

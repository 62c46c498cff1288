"""What a worker's model runner tells the steering: who came, who went, which tokens are whose.

vLLM has two runners. Both are watched at the same points: a pass begins (requests come and go),
its inputs are prepared (the batch is final), its tokens are sampled (it is over).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from trimtab.serving.engines.vllm.live_request import BatchRow
from trimtab.serving.engines.vllm.plan_wire import ASKED, KEY
from trimtab.serving.engines.vllm.reports import ATTRIBUTE
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering


def hook_runner(runner: Any, steering: WorkerSteering) -> None:
    """Watch a runner of either kind."""
    _watch_passes(runner, steering)
    if hasattr(runner, "prepare_inputs"):
        _watch_inputs(runner, "prepare_inputs", steering, _second_rows)
    else:
        _watch_inputs(runner, "_prepare_inputs", steering, _first_rows)
        _watch_dummies(runner, steering)
    _watch_samples(runner, steering)


def _watch_passes(runner: Any, steering: WorkerSteering) -> None:
    original = runner.execute_model

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        # The second runner's dummy passes come this way too; its argument after two others.
        is_dummy = kwargs.get("dummy_run") or (len(args) > 1 and args[1])
        steering.step = None
        if not is_dummy:
            _follow(scheduled, steering)
        return original(scheduled, *args, **kwargs)

    runner.execute_model = execute_model


def _follow(scheduled: Any, steering: WorkerSteering) -> None:
    if not steering.is_idle:
        for name in scheduled.finished_req_ids:
            steering.forget(name)
        for name in scheduled.preempted_req_ids or ():
            steering.preempt(name)
    for new in scheduled.scheduled_new_reqs:
        params = new.sampling_params
        if params is None or not params.extra_args:
            continue
        if KEY in params.extra_args or ASKED in params.extra_args:
            steering.forget(new.req_id)  # a preempted request may come again as a new one
            steering.admit(new.req_id, params.extra_args, new.prompt_token_ids or ())


def _watch_inputs(
    runner: Any,
    name: str,
    steering: WorkerSteering,
    rows: Callable[[Any, Any, Any], Iterator[BatchRow]],
) -> None:
    original = getattr(runner, name)

    def prepare(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(scheduled, *args, **kwargs)
        if not steering.is_idle:
            steering.begin(list(rows(runner, scheduled, prepared)))
        return prepared

    setattr(runner, name, prepare)


def _first_rows(runner: Any, scheduled: Any, prepared: Any) -> Iterator[BatchRow]:
    batch = runner.input_batch
    drafts = scheduled.scheduled_spec_decode_tokens
    knows_tokens = not runner.use_async_scheduling
    starts = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
    for i, name in enumerate(batch.req_ids):
        yield BatchRow(
            id=name,
            n_tokens=scheduled.num_scheduled_tokens[name],
            start=starts[i],
            n_drafts=len(drafts.get(name, ())) if drafts else 0,
            ids=batch.token_ids_cpu[i] if knows_tokens else None,
        )


def _second_rows(runner: Any, scheduled: Any, prepared: Any) -> Iterator[BatchRow]:
    drafts = scheduled.scheduled_spec_decode_tokens
    begins = prepared.query_start_loc_np.tolist()
    starts = prepared.num_computed_tokens_np.tolist()
    for i, name in enumerate(prepared.req_ids):
        yield BatchRow(
            id=name,
            n_tokens=begins[i + 1] - begins[i],
            start=starts[i],
            n_drafts=len(drafts.get(name, ())) if drafts else 0,
        )


def _watch_dummies(runner: Any, steering: WorkerSteering) -> None:
    original = runner._dummy_run

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        steering.step = None
        return original(*args, **kwargs)

    runner._dummy_run = dummy_run


def _watch_samples(runner: Any, steering: WorkerSteering) -> None:
    original = runner.sample_tokens

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        with _spared_generators(runner):
            output = original(*args, **kwargs)
        if steering.is_idle:
            return output
        if not hasattr(output, "get_output"):
            reports = steering.end(_n_sampled(output))
            return _with_reports(output, reports) if output is not None else output
        # Tokens are still on their way from the device; the reports wait for them.
        reports = steering.end()
        get_output = output.get_output
        output.get_output = lambda: _with_reports(get_output(), reports)
        return output

    runner.sample_tokens = sample_tokens


@contextmanager
def _spared_generators(runner: Any) -> Iterator[None]:
    """Keep the generators of prompts that are not whole yet out of sampling, on a CPU.

    vLLM draws a token for them, throws it away and turns the generator back, which torch's CPU
    generators cannot do: one seeded request with a long prompt would end the engine.
    """
    batch: Any = getattr(runner, "input_batch", None)
    generators = getattr(batch, "generators", None)
    if not generators or runner.device.type != "cpu":
        yield
        return
    unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    spared = {i: generators.pop(i) for i in unfinished if i in generators}
    try:
        yield
    finally:
        generators.update(spared)


def _n_sampled(output: Any) -> dict[str, int]:
    tokens = getattr(output, "sampled_token_ids", None) or []
    return dict(zip(output.req_ids, map(len, tokens), strict=False)) if output else {}


def _with_reports(output: Any, reports: dict[str, Any]) -> Any:
    """Return a runner's output with reports for the scheduler's process; see `reports.py`."""
    if reports:
        output = copy(output)  # an empty output is shared by all passes
        setattr(output, ATTRIBUTE, reports)
    return output

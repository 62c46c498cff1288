"""The entry point that vLLM calls in every one of its processes, and everything it changes there.

vLLM has no interface for steering, so these methods are wrapped; each wrapper calls the original
once, with its own arguments, and does nothing for a request that is not steered. `contract.py`
names what is relied on, and a version in which something is missing is refused when it starts.

    where                             what is added
    Worker.load_model                 the decoder layers are armed, the runner is watched
    VllmConfig.__post_init__          the compile cache's key, graph splits, refused options
    Request.__init__                  the prefix cache's salt
    generate_block_hash_extra_keys    the key of answer blocks
    Scheduler.__init__                whether blocks are shared outside vLLM
    Scheduler.update_from_output      reports go on, failed requests end
    OutputProcessor.process_outputs   reports are lifted off
    OutputProcessor.add_request       steered answers of vLLM's server are followed
    AsyncLLM.add_request              `vllm_xargs.steering` is compiled (`plain_vllm.py`)
    LLMEngine.add_request             and refused where nothing could compile it
    ChatCompletionRequest and others  as is what vLLM would ignore (`unheard.py`)

vLLM does have an interface for quantisation methods, and is told ours (`quantization.py`).

TRIMTAB_VLLM=off leaves vLLM as it is, but for quantised folders of ours, which vLLM's own methods
would run as something else, and for refusing requests that ask for steering.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from trimtab.steering.errors import ModelLoadError

logger = logging.getLogger(__name__)

SWITCH = "TRIMTAB_VLLM"
BLOCK_KEYS = "generate_block_hash_extra_keys"
"""A function that two of vLLM's modules hold under this name; both are wrapped."""

_is_registered = False


def register() -> None:
    """Install the wrappers in this process, once.

    Raises:
        ModelLoadError: this vLLM lacks something that steering relies on.
    """
    global _is_registered
    if _is_registered:
        return
    from trimtab.serving.engines.vllm.plain_vllm import guard_requests

    is_on = is_switched_on()
    if is_on:
        try:
            _install()
        except (ImportError, AttributeError) as error:
            raise ModelLoadError(
                f"trimtab does not fit vLLM {_vllm_version()}: {error}. Versions 0.26 to 0.32 are "
                f"known to work; {SWITCH}=off runs vLLM without steering."
            ) from error
    else:
        try:
            _tell_of_quantization()
        except (ImportError, AttributeError) as error:
            logger.warning("trimtab's quantised models cannot be served: %s", error)
    guard_requests(is_on=is_on)
    _is_registered = True


def is_switched_on() -> bool:
    """Return whether this process may steer."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false")


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _install() -> None:
    from vllm.config import VllmConfig
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu_worker import Worker

    from trimtab.serving.engines.vllm import plain_answers
    from trimtab.serving.engines.vllm.reports import Pending, lift_off
    from trimtab.serving.engines.vllm.vllm_config import fit_config
    from trimtab.serving.engines.vllm.worker_rpc import WORKER_METHODS, load_and_arm

    # Looked up before the first is changed: a version is fitted whole or not at all.
    for owner, names in (
        (Worker, ("load_model",)),
        (VllmConfig, ("__post_init__",)),
        (Request, ("__init__",)),
        (kv_cache_utils, (BLOCK_KEYS,)),
        (block_pool, (BLOCK_KEYS,)),
        (Scheduler, ("__init__", "update_from_output", "finish_requests")),
        (OutputProcessor, ("process_outputs", "add_request", "abort_requests")),
    ):
        for name in names:
            getattr(owner, name)

    _tell_of_quantization()
    _wrap(Worker, "load_model", load_and_arm)
    for name, method in WORKER_METHODS.items():
        setattr(Worker, name, method)
    _wrap(VllmConfig, "__post_init__", fit_config)
    _wrap(Request, "__init__", _with_salt)
    for module in (kv_cache_utils, block_pool):
        _wrap(module, BLOCK_KEYS, _with_answer_key)

    def update(original: Any, scheduler: Any, scheduled: Any, output: Any) -> Any:
        pending = scheduler.__dict__.setdefault("_trimtab_pending", Pending())
        return pending.update(scheduler, scheduled, output, original)

    _wrap(Scheduler, "update_from_output", update)
    _wrap(Scheduler, "__init__", _with_connector)

    def process(original: Any, processor: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        lift_off(processor, outputs)
        return plain_answers.process(original, processor, outputs, *args, **kwargs)

    _wrap(OutputProcessor, "process_outputs", process)
    _wrap(OutputProcessor, "add_request", plain_answers.follow)


def _tell_of_quantization() -> None:
    from trimtab.serving.engines.vllm.quantization import register_quantization

    register_quantization()


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Let `wrapper(original, *args, **kwargs)` stand in for a method, or a module's function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _with_salt(original: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    from trimtab.serving.engines.vllm.prefix_cache import cache_rule, salted

    rule = cache_rule(kwargs.get("sampling_params"))
    if rule is not None:
        kwargs["cache_salt"] = salted(
            kwargs.get("cache_salt"),
            rule,
            request_id=kwargs["request_id"],
            shares_outside=_shares_outside,
        )
    original(request, *args, **kwargs)


_shares_outside = False  # whether blocks leave for a store that does not know their extra keys


def _with_connector(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    global _shares_outside
    original(scheduler, *args, **kwargs)
    _shares_outside = scheduler.connector is not None


def _with_answer_key(
    original: Any, request: Any, start: int, end: int, *args: Any, **kwargs: Any
) -> Any:
    from trimtab.serving.engines.vllm.prefix_cache import answer_key

    extra, index = original(request, start, end, *args, **kwargs)
    own = answer_key(request, end)
    return ((*(extra or ()), own), index) if own is not None else (extra, index)

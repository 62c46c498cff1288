"""Facts about the model that a running vLLM serves, measured through vLLM itself."""

from __future__ import annotations

import asyncio
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.serving.engines.base import EngineInfo
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_request
from trimtab.serving.engines.vllm.reports import INBOXES, Inbox
from trimtab.serving.engines.vllm.support import Support
from trimtab.steering.bank_room import Needs
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.profile import ref_without_weights, sample_ids
from trimtab.steering.plan import Plan
from trimtab.steering.thinking import ThinkingMarks


@dataclass(frozen=True)
class ServedModel:
    """What requests are compiled and checked against.

    Attributes:
        info: what the app knows of an engine.
        support: what this vLLM can do.
        size: of each worker's bank.
        n_workers: how many there are, each with a part of the model.
        marks: the model's thinking marks, if it has any.
    """

    info: EngineInfo
    support: Support
    size: Needs
    n_workers: int
    marks: ThinkingMarks | None

    def marks_for(self, plan: Plan | None) -> tuple[int, int] | None:
        """Return the ids that workers must watch for, None if nothing depends on them."""
        if self.marks is None or plan is None or not _tells_thinking(plan):
            return None
        return self.marks.open, self.marks.close


async def measured(llm: Any, *, name: str, source: str, reason: str) -> ServedModel:
    """Ask the workers what they are, and run a text through the model.

    Args:
        llm: a running `AsyncLLM`.
        name: the model's name in artifacts.
        source: the folder or Hugging Face id that vLLM loaded.
        reason: why that one, for people.

    Raises:
        ModelLoadError: steering does not reach every layer, or the model is of no known kind.
    """
    config = llm.vllm_config
    facts = await llm.collective_rpc("trimtab_facts")
    _check_layers(facts)
    one = facts[0]
    support = Support.of(config, facts)
    tokenizer = llm.get_tokenizer()
    marks = ThinkingMarks.of(tokenizer)
    max_context = int(config.model_config.max_model_len)
    vocab_size = int(config.model_config.get_vocab_size())
    ids = sample_ids(tokenizer, vocab_size=vocab_size, max_context=max_context - 1)
    norms = await _hidden_norms(llm, ids, n_layers=one["n_layers"])
    ref = await asyncio.to_thread(ref_without_weights, source, model_id=name)
    info = EngineInfo(
        model=ref,
        tokenizer=tokenizer,
        hidden_norms=norms,
        max_context=max_context,
        has_thinking=marks is not None,
        choices={"model": reason, **support.sentences},
    )
    size = Needs(one["max_slots"], one["max_rows"], one["max_low_rank"], one["max_guides"])
    return ServedModel(info, support, size, len(facts), marks)


def _check_layers(facts: Sequence[Mapping[str, Any]]) -> None:
    armed = {layer for rank in facts for layer in rank["layers"]}
    missing = sorted(set(range(facts[0]["n_layers"])) - armed)
    if missing:
        raise ModelLoadError(f"Layers {missing} of this model were not found on any vLLM worker.")


async def _hidden_norms(llm: Any, ids: Sequence[int], *, n_layers: int) -> torch.Tensor:
    """Run a text through the model and return the median |h| of each layer, `[n_layers]`.

    It goes the way of every steered request, so it also proves that all layers are armed.
    """
    from vllm import SamplingParams

    extra = {KEY: packed_request(None, measures=True)}
    params = SamplingParams(max_tokens=1, detokenize=False, extra_args=extra)
    params.skip_reading_prefix_cache = True
    # Several API servers may measure at once; each collects what is under its own name.
    name = f"trimtab-profile-{uuid.uuid4().hex}"
    inbox = INBOXES[name] = Inbox()
    try:
        async for _ in llm.generate({"prompt_token_ids": list(ids)}, params, name):
            pass
    finally:
        INBOXES.pop(name, None)
    if inbox.failure or not inbox.is_applied:
        raise ModelLoadError(
            f"Steering does not reach this model on vLLM: {inbox.failure or 'no report came'}."
        )
    return await _collected(llm, name, n_tokens=len(ids), n_layers=n_layers)


async def _collected(llm: Any, name: str, *, n_tokens: int, n_layers: int) -> torch.Tensor:
    by_layer: dict[int, list[float]] = {}
    for _ in range(50):  # a request is let go of at the next step
        for rank in await llm.collective_rpc("trimtab_take_norms", args=(name,)):
            by_layer.update({layer: values for _, layer, values in rank})
        if len(by_layer) == n_layers:
            break
        await asyncio.sleep(0.05)
    short = [n for n in range(n_layers) if len(by_layer.get(n, ())) < n_tokens]
    if short:
        raise ModelLoadError(f"Steering does not reach layers {short} of this model on vLLM.")
    medians = [statistics.median_low(by_layer[n][1:n_tokens]) for n in range(n_layers)]
    return torch.tensor(medians, dtype=torch.float32).clamp_min(1e-6)


def _tells_thinking(plan: Plan) -> bool:
    """Return whether a plan treats thinking spans unlike the rest of the answer."""
    return any(part.window.thinking != part.window.generation for part in plan.parts)

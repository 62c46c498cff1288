"""Our sampling parameters as vLLM's, and vLLM's log-probabilities as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.serving.engines.base import Logprob, Request, TokenLogprobs


def vllm_params(request: Request, *, extra_args: Mapping[str, Any] | None) -> Any:
    """Return vLLM's `SamplingParams` for a request.

    Text and stop strings are ours (`serving/detokenizer.py`), so that both engines end an answer
    at the same character. vLLM generates at least one token; who asked for none drops it.

    Args:
        request: the request.
        extra_args: what travels with it to the workers.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = request.sampling
    return SamplingParams(
        max_tokens=max(wanted.max_tokens, 1),
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=wanted.seed,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        repetition_penalty=wanted.repetition_penalty,
        logit_bias=dict(wanted.logit_bias) or None,
        stop_token_ids=list(wanted.stop_token_ids) or None,
        ignore_eos=wanted.ignore_eos,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=dict(extra_args) if extra_args else None,
        # What a gate reads of the whole prompt must be run, not remembered.
        skip_reading_prefix_cache=True if _reads_whole_prompt(request) else None,
    )


def _reads_whole_prompt(request: Request) -> bool:
    return request.plan is not None and request.plan.needs_whole_prompt


def token_logprobs(
    found: Mapping[int, Any], token_id: int, *, top: int, text: Callable[[int], str]
) -> TokenLogprobs:
    """Return one token's log-probabilities from vLLM's dict of the chosen and the likeliest.

    Args:
        found: token id -> vLLM's `Logprob`.
        token_id: the chosen token.
        top: alternatives to report.
        text: a token's text.
    """
    ranked = sorted(found.items(), key=lambda item: (-item[1].logprob, item[0] != token_id))
    made = {
        one: Logprob(one, text(one), float(entry.logprob), int(entry.rank or rank))
        for rank, (one, entry) in enumerate(ranked, start=1)
    }
    return TokenLogprobs(made[token_id], tuple(list(made.values())[:top]))

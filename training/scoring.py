"""Measures of a model under a plan: answers' log-probabilities, perplexity, degeneration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.steering.plan import Plan
from trimtab.training.steered_model import SteeredModel, batches


@dataclass(frozen=True)
class Answer:
    """A prompt and an answer as tokens.

    Attributes:
        ids: prompt and answer.
        n_prompt: where the answer begins.
        n_end: end marks behind the answer's own tokens, 0 or 1.
    """

    ids: tuple[int, ...]
    n_prompt: int
    n_end: int = 0


def answer_of(tokenizer: Any, prompt: str, text: str) -> Answer:
    """Return the tokens of an answer to a prompt in the model's chat template.

    The answer ends with the model's end mark where it has one. A model without a template gets
    the two texts one after the other; with an empty prompt the whole text is the answer.
    """
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if not prompt:
        ids = tokenizer(text)["input_ids"]
        return Answer(tuple(ids), min(1, len(ids) - 1))
    if getattr(tokenizer, "chat_template", None):
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        tail = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    return Answer((*head, *tail, *end), len(head), len(end))


@torch.inference_mode()
def answer_logprobs(
    host: SteeredModel, answers: Sequence[Answer], *, plan: Plan | None = None
) -> torch.Tensor:
    """Return each answer's mean log-probability a token given its prompt, `[n]`, float32.

    The mean, not the sum: a steered model that is less sure of everything would otherwise seem to
    prefer the shorter of two answers. The plan acts on prompt and answer.
    """
    result = torch.zeros(len(answers))
    for group in batches([len(a.ids) for a in answers]):
        rows = [answers[i] for i in group]
        scores, first = _logprobs(
            host, [r.ids for r in rows], plan=plan, first=min(r.n_prompt for r in rows)
        )
        for i, row, score in zip(group, rows, scores, strict=True):
            result[i] = score[row.n_prompt - first : len(row.ids) - first].mean()
    return result


@torch.inference_mode()
def perplexity(
    host: SteeredModel, ids: Sequence[int], *, plan: Plan | None = None, window: int = 512
) -> float:
    """Return the perplexity of a text, in windows that share no context."""
    total, n = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        row = list(ids[start : start + window])
        scores, _ = _logprobs(host, [row], plan=plan, first=1)
        total -= float(scores.sum())
        n += len(row) - 1
    return math.exp(total / n)


def _logprobs(
    host: SteeredModel, rows: Sequence[Sequence[int]], *, plan: Plan | None, first: int
) -> tuple[torch.Tensor, int]:
    """Return log P of each token from position `first` on, `[n_rows, longest - first]`."""
    ids = host.pad(rows)
    n_rows, n_tokens = ids.shape
    keep = torch.arange(first - 1, n_tokens - 1, device=host.device)
    with host.under(plan, n_rows=n_rows, n_tokens=n_tokens):
        logits = host.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    scores = torch.zeros(n_rows, n_tokens - first)
    for r in range(n_rows):  # a row at a time bounds the float32 copy of the logits
        row = logits[r].float()
        own = row.gather(1, ids[r, first:].unsqueeze(1))[:, 0]
        scores[r] = (own - row.logsumexp(-1)).cpu()
    return scores, first


@dataclass(frozen=True)
class Generation:
    """A greedy continuation: its tokens and the mean entropy of the choices, in nats."""

    ids: tuple[int, ...]
    entropy: float


@torch.inference_mode()
def generate(
    host: SteeredModel, prompts: Sequence[Sequence[int]], n_tokens: int, *, plan: Plan | None = None
) -> list[Generation]:
    """Continue each prompt greedily by at most `n_tokens`, one prompt at a time."""
    ends = getattr(host.model.generation_config, "eos_token_id", None)
    end_ids = {ends} if isinstance(ends, int) else set(ends or ())
    results = []
    for prompt in prompts:
        ids, entropies, cache, start = list(prompt), [], None, 0
        for _ in range(n_tokens):
            row = torch.tensor([ids[start:]], device=host.device)
            n_new = row.shape[1]
            with host.under(plan, n_rows=1, n_tokens=n_new, start=start, n_prompt=len(prompt)):
                output = host.model(input_ids=row, past_key_values=cache, use_cache=True)
            start, cache = len(ids), output.past_key_values
            logprobs = output.logits[0, -1].float().log_softmax(-1)
            entropies.append(float(-(logprobs.exp() * logprobs).sum()))
            ids.append(int(logprobs.argmax()))
            if ids[-1] in end_ids:
                break
        mean = sum(entropies) / max(1, len(entropies))
        results.append(Generation(tuple(ids[len(prompt) :]), mean))
    return results


def repetition(ids: Sequence[int], *, n: int = 3) -> float:
    """Return the share of a text's n-grams that occurred before in it, 0 to 1."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    if not grams:
        return 0.0
    return 1.0 - len(Counter(grams)) / len(grams)

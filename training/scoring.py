"""Measures of a model under a plan: answers' log-probabilities, perplexity, degeneration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trimtab.steering.errors import DataError
from trimtab.steering.plan import Plan
from trimtab.training.row_reader import RowReader
from trimtab.training.steered_model import SteeredModel

_MAX_ROWS = 32


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
    the two texts one after the other; with an empty prompt the whole text is the answer, except
    its first token, which nothing predicts.

    Raises:
        DataError: a text without a prompt that is shorter than two tokens.
    """
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if not prompt:
        ids = tokenizer(text)["input_ids"]
        if len(ids) < 2:
            raise DataError(
                f"The text {text!r} is {len(ids)} tokens long; without a prompt it takes two or "
                "more to be scored."
            )
        return Answer(tuple(ids), 1)
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


def answer_logprobs(
    host: SteeredModel, answers: Sequence[Answer], *, plan: Plan | None = None
) -> torch.Tensor:
    """Return each answer's mean log-probability a token given its prompt, `[n]`, float32.

    The mean, not the sum: a steered model that is less sure of everything would otherwise seem to
    prefer the shorter of two answers. The plan acts on prompt and answer.
    """
    result = torch.zeros(len(answers))
    for group in host.batches([len(a.ids) for a in answers]):
        rows = [answers[i] for i in group]
        scores, first = _logprobs(
            host, [r.ids for r in rows], plan=plan, first=min(r.n_prompt for r in rows)
        )
        for i, row, score in zip(group, rows, scores, strict=True):
            result[i] = score[row.n_prompt - first : len(row.ids) - first].mean()
    return result


def perplexity(
    host: SteeredModel, ids: Sequence[int], *, plan: Plan | None = None, window: int = 512
) -> float:
    """Return the perplexity of a text, in windows that share no context.

    A window is never longer than what the model can attend to.
    """
    window = min(window, host.profile.max_context)
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
    reader = RowReader(host, plan=plan)
    parts = host.parts(*ids.shape)
    scores = [host.run(partial(_part_logprobs, reader, ids, part, first)) for part in parts]
    return torch.cat(scores, dim=1), first


def _part_logprobs(reader: RowReader, ids: torch.Tensor, part: range, first: int) -> torch.Tensor:
    """Return log P of the tokens from `first` on that a part of their rows predicts."""
    n_rows, n_tokens = ids.shape
    start = max(first - 1, part.start)
    keep = torch.arange(start, max(start, min(part.stop, n_tokens - 1)), device=ids.device)
    # A part of a prompt predicts nothing that is asked for; heads take one token at least.
    places = keep - part.start if len(keep) else torch.zeros_like(ids[0, :1])
    logits = reader.read(
        ids[:, part.start : part.stop], is_last=part.stop == n_tokens, logits_to_keep=places
    ).logits[:, : len(keep)]
    scores = torch.zeros(n_rows, len(keep))
    for r in range(n_rows):  # a row at a time bounds the float32 copy of the logits
        row = logits[r].float()
        own = row.gather(1, ids[r, keep + 1].unsqueeze(1))[:, 0]
        scores[r] = (own - row.logsumexp(-1)).cpu()
    return scores


@dataclass(frozen=True)
class Generation:
    """A greedy continuation: its tokens and the mean entropy of the choices, in nats."""

    ids: tuple[int, ...]
    entropy: float


def generate(
    host: SteeredModel,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    plan: Plan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt greedily by at most `n_tokens`.

    Prompts of one length go together. Nothing is padded, so a batch is right for any architecture.

    Args:
        host: the model.
        prompts: tokens of each, none empty.
        n_tokens: at most this many new ones, the end mark included.
        plan: acts on prompt and continuation.
        progress: called with prompts done and in all.
    """
    results: list[Generation | None] = [None] * len(prompts)
    done = 0
    for group in _of_one_length(host, prompts):
        rows = [prompts[i] for i in group]
        for i, generation in zip(group, _continue(host, rows, n_tokens, plan), strict=True):
            results[i] = generation
        done += len(group)
        if progress is not None:
            progress(done, len(prompts))
    return [generation for generation in results if generation is not None]


def end_tokens(host: SteeredModel) -> frozenset[int]:
    """Return the tokens that end the model's answers."""
    ends = getattr(host.model.generation_config, "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _of_one_length(host: SteeredModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    groups = []
    for n_tokens, same in by_length.items():
        n_rows = host.rows_at_once(n_tokens, most=_MAX_ROWS)
        groups += [same[at : at + n_rows] for at in range(0, len(same), n_rows)]
    return groups


def _continue(
    host: SteeredModel, prompts: Sequence[Sequence[int]], n_tokens: int, plan: Plan | None
) -> list[Generation]:
    end_ids = end_tokens(host)
    n_rows, n_prompt = len(prompts), len(prompts[0])
    new: list[list[int]] = [[] for _ in prompts]
    entropies: list[list[float]] = [[] for _ in prompts]
    is_open = [True] * n_rows
    ids = torch.tensor([list(p) for p in prompts], device=host.device)
    reader = RowReader(host, plan=plan, n_prompt=n_prompt)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        # Named by its place the last row is copied, sliced it is a view, over which bfloat16's
        # product on a CPU takes 0.1 s a row (49152 words, one Zen 5 core); the numbers are the
        # same. Those of float32 would differ in the last bit, and its product takes views well.
        is_wide = host.loaded.dtype == torch.float32
        keep = 1 if is_wide else torch.tensor([ids.shape[1] - 1], device=host.device)
        output = reader.read(ids, is_last=False, logits_to_keep=keep)
        logprobs = output.logits[:, -1].float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.argmax(-1, keepdim=True), entropy

    def read_before(part: range) -> None:
        reader.read(ids[:, part.start : part.stop], is_last=False, model=host.model.base_model)

    *before, last = host.parts(n_rows, n_prompt)
    for part in before:
        host.run(partial(read_before, part))
    ids = ids[:, last.start :]
    for _ in range(n_tokens):
        ids, entropy = host.run(step)
        for r in range(n_rows):
            if is_open[r]:
                new[r].append(int(ids[r, 0]))
                entropies[r].append(float(entropy[r]))
                is_open[r] = new[r][-1] not in end_ids
        if not any(is_open):
            break
    return [
        Generation(tuple(row), sum(e) / max(1, len(e)))
        for row, e in zip(new, entropies, strict=True)
    ]

"""The text quantisation is calibrated on: no data is needed, the model writes half of it.

One half is bundled: questions with answers in several styles, in the model's chat template. The
other the model samples itself from bundled beginnings; where it ends a text, the next one begins.
What a model writes shows the states it is used in, rare tokens among them; what it was given shows
states it would not have come to by itself.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.errors import DataError
from trimtab.training.scoring import answer_of
from trimtab.training.vectors.neutral import neutral_questions, neutral_text
from trimtab.training.vectors.pairs import concept, concepts

# A start longer than this leaves the row to us instead of to the model.
_START_TOKENS = 24
_AT_ONCE = 32
_CACHES = ("past_key_values", "cache_params")  # attention's name for it, and state-space models'

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """Rows of tokens to calibrate on.

    Attributes:
        ids: `[n_rows, n_tokens]`, int64, on the CPU.
        held: further rows that no quantiser sees, `[n_held, n_tokens]`.
        origin: what they are, in a phrase.
    """

    ids: torch.Tensor
    held: torch.Tensor
    origin: str

    @property
    def digest(self) -> str:
        """SHA-256 of all rows in hexadecimal: the same text, the same quantised model."""
        shape = repr((tuple(self.ids.shape), tuple(self.held.shape))).encode()
        rows = self.ids.numpy().tobytes() + self.held.numpy().tobytes()
        return hashlib.sha256(shape + rows).hexdigest()


def split_rows(ids: torch.Tensor, *, origin: str) -> CalibrationText:
    """Set one row in sixteen, at least one, aside for measuring.

    Args:
        ids: `[n_rows, n_tokens]`, at least two rows.
        origin: what they are.
    """
    n_held = max(1, len(ids) // 16)
    return CalibrationText(ids[:-n_held].contiguous(), ids[-n_held:].contiguous(), origin)


def text_from_file(
    path: Path, tokenizer: Any, *, n_rows: int, n_tokens: int, seed: int = 0
) -> CalibrationText:
    """Cut a text file into rows, drawn from all over it.

    Args:
        path: UTF-8 text.
        tokenizer: the model's.
        n_rows: wanted; a shorter file gives fewer.
        n_tokens: of a row.
        seed: which rows are drawn from a longer file.

    Raises:
        DataError: no such file, no text, or fewer than two rows in it.
    """
    ids = tokens_of(path, tokenizer)
    n_there = len(ids) // n_tokens
    if n_there < 2:
        raise DataError(
            f"{str(path)!r} has {len(ids)} tokens; calibration takes rows of {n_tokens} and at "
            "least two of them. Give a longer text, or leave --calibration out and the model "
            "writes its own."
        )
    rows = torch.tensor(ids[: n_there * n_tokens]).view(n_there, n_tokens)
    chosen = sorted(random.Random(seed).sample(range(n_there), min(n_rows, n_there)))
    return split_rows(rows[chosen], origin=f"{len(chosen)} rows of {path.name}")


def tokens_of(path: Path, tokenizer: Any) -> list[int]:
    """Return the tokens of a UTF-8 text file, without special ones.

    Raises:
        DataError: it is not there, or no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read as UTF-8 text: {error}.") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def default_text(
    model: Any,
    tokenizer: Any,
    *,
    n_rows: int,
    n_tokens: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationText:
    """Return bundled and self-written rows in turn; what the bundle lacks, the model writes.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        n_rows: wanted, at least two.
        n_tokens: of a row.
        seed: of everything that is drawn.
        progress: told of tokens written by the model and in all.
    """
    given = bundled_rows(tokenizer, n_tokens=n_tokens, seed=seed)[: n_rows // 2]
    n_own = n_rows - len(given)
    own = own_rows(model, tokenizer, n_rows=n_own, n_tokens=n_tokens, seed=seed, progress=progress)
    n_pairs = len(given)
    rows = torch.cat([torch.stack([own[:n_pairs], given], 1).flatten(0, 1), own[n_pairs:]])
    origin = f"{n_own} rows of {n_tokens} tokens by the model itself, {n_pairs} bundled"
    return split_rows(rows, origin=origin)


def bundled_rows(tokenizer: Any, *, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return the bundled questions and answers as rows, `[n_rows, n_tokens]`, int64.

    Only what vectors are built from: what they are measured on stays unseen.
    """
    said = [
        answer_of(tokenizer, pair.prompt, text).ids
        for name in concepts()
        for pair in concept(name).build
        for text in (pair.preferred, pair.dispreferred)
    ]
    random.Random(seed).shuffle(said)
    ids = [token for tokens in said for token in tokens]
    n_rows = len(ids) // n_tokens
    return torch.tensor(ids[: n_rows * n_tokens], dtype=torch.int64).view(n_rows, n_tokens)


def own_rows(
    model: Any,
    tokenizer: Any,
    *,
    n_rows: int,
    n_tokens: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let the model write rows from the bundled beginnings.

    Sampled at temperature 1 from the whole distribution: cut tails (top-p) would hide the rare
    tokens whose states are the outliers. Rows go side by side; a prompt's tokens are fed in place
    of sampled ones, so nothing is padded and any architecture with a cache works.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        n_rows: to write.
        n_tokens: of a row.
        seed: of prompts' order and of the samples.
        progress: told of tokens written and in all.

    Returns:
        `[n_rows, n_tokens]`, int64.

    Source: data-free calibration by the model's own samples is LLM-QAT's, arXiv 2305.17888,
        section 3.1. Differs: samples start from prompts of several kinds, not from single tokens,
        because a small model that starts from nothing mostly writes one kind of text.
    """
    starts = _starts(tokenizer, seed=seed)
    ends = _end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    total = n_rows * n_tokens
    while len(rows) < n_rows:  # none, if none are wanted
        n_now = min(_AT_ONCE, n_rows - len(rows))

        def written(n: int, before: int = len(rows) * n_tokens, n_now: int = n_now) -> None:
            if progress is not None:
                progress(before + n * n_now, total)

        rows += _write(model, n_now, n_tokens, starts, ends, generator, written)
    return torch.tensor(rows, dtype=torch.int64)


@torch.inference_mode()
def _write(
    model: Any,
    n_rows: int,
    n_tokens: int,
    starts: Iterator[list[int]],
    ends: frozenset[int],
    generator: torch.Generator,
    written: Callable[[int], None],
) -> list[list[int]]:
    """Write some rows side by side, one token of each a step."""
    device = next(model.parameters()).device
    forced = [next(starts)[::-1] for _ in range(n_rows)]
    rows: list[list[int]] = [[queue.pop()] for queue in forced]
    cache: dict[str, Any] = {}
    for step in range(1, n_tokens):
        last = torch.tensor([[row[-1]] for row in rows], device=device)
        output = model(input_ids=last, use_cache=True, **cache)
        cache = {name: output[name] for name in _CACHES if output.get(name) is not None}
        if not cache:
            raise DataError(
                f"A {type(model).__name__} keeps no cache that trimtab knows and would write text "
                "for hours: give a text with --calibration FILE."
            )
        # Drawn on the CPU, so that a seed gives the same text wherever the logits are the same.
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
        for row, queue, token in zip(rows, forced, drawn, strict=True):
            if not queue and row[-1] in ends:
                queue.extend(next(starts)[::-1])
            row.append(queue.pop() if queue else token)
        written(step + 1)
    return rows


def _starts(tokenizer: Any, *, seed: int) -> Iterator[list[int]]:
    """Yield the tokens of one start after another, forever, in a seeded order."""
    proses = [text for text in neutral_text().split("\n\n") if text.strip()]
    answers = [
        text
        for name in concepts()
        for pair in concept(name).build[:12]
        for text in (pair.preferred, pair.dispreferred)
    ]
    begun = [
        ids[:n]
        for text in proses + answers
        if (ids := tokenizer(text, verbose=False)["input_ids"])
        for n in (_START_TOKENS // 4, _START_TOKENS)
    ]
    asked = [_asked(tokenizer, question) for question in neutral_questions()]
    starts = begun + asked
    if not starts:
        raise DataError("The tokenizer makes no tokens of the bundled prompts.")
    shuffle = random.Random(seed)
    while True:
        yield from shuffle.sample(starts, len(starts))


def _asked(tokenizer: Any, question: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(question)["input_ids"])
    chat = [{"role": "user", "content": question}]
    return list(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())

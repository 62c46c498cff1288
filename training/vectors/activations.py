"""Hidden states of answers at every decoder layer, one vector a pair and side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from trimtab.steering.errors import DataError
from trimtab.steering.model.hooks import captured
from trimtab.training.row_reader import RowReader
from trimtab.training.scoring import Answer
from trimtab.training.steered_model import SteeredModel

T = TypeVar("T")
States = Mapping[int, torch.Tensor]
"""Layer -> states of consecutive tokens of one text, `[n_tokens, hidden_size]`."""

Position = str | int
"""`last` (the answer's last token before its end mark), `mean` (over the answer) or an index into
the answer, negative from its end."""


def parse_position(text: str) -> Position:
    """Return a position from its text form.

    Raises:
        DataError: neither `last`, `mean` nor a whole number.
    """
    if text in ("last", "mean"):
        return text
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"Position {text!r} is not known; use 'mean', 'last' or an index into the answer."
        ) from None


def hidden_states(
    host: SteeredModel,
    answers: Sequence[Answer],
    *,
    position: Position = "mean",
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return one hidden state a layer for each answer, `[n, n_layers, hidden_size]`, float32.

    Args:
        host: the model, unsteered.
        answers: prompts with answers; the end token at an answer's end is not read.
        position: which of the answer's tokens.
        progress: called with rows done and rows in all.

    Raises:
        DataError: an answer is too short for the index.
    """
    n_layers = len(host.profile.layers)
    result = torch.zeros(len(answers), n_layers, host.profile.ref.hidden_size)
    tokens = [tokens_at(answer, position) for answer in answers]

    def share(i: int, states: States, part: range) -> torch.Tensor:
        """What a part's tokens add to the answer's mean."""
        own = [at - part.start for at in part if tokens[i].start <= at < tokens[i].stop]
        n_read = tokens[i].stop - tokens[i].start
        return torch.stack([states[n][own].float().sum(0).cpu() / n_read for n in range(n_layers)])

    layers = range(n_layers)
    for i, state in each_answer(host, answers, layers=layers, read=share, progress=progress):
        result[i] += state
    return result


def each_answer(
    host: SteeredModel,
    answers: Sequence[Answer],
    *,
    layers: Sequence[int],
    read: Callable[[int, States, range], T],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (number of the answer, what was read of it), texts of similar length together.

    A text that is too long for one pass is read in parts: it comes once a part, first to last.

    Args:
        host: the model, unsteered.
        answers: texts as tokens.
        layers: decoder layers whose outputs are read.
        read: takes an answer's number, the states of some of its tokens, on the model's device in
            its dtype, and which tokens these are, and returns what is wanted of them. A shorter
            text's states and tokens go on past its end. It is part of the piece that runs the
            model: the states are gone when that ends.
        progress: called with texts done and in all.
    """
    done = 0
    for group in host.batches([len(a.ids) for a in answers]):
        ids = host.pad([answers[i].ids for i in group])
        reader = RowReader(host)
        for part in host.parts(*ids.shape):
            found = host.run(partial(_read, host, reader, ids, part, group, layers, read))
            yield from zip(group, found, strict=True)
        done += len(group)
        if progress is not None:
            progress(done, len(answers))


def _read(
    host: SteeredModel,
    reader: RowReader,
    ids: torch.Tensor,
    part: range,
    group: Sequence[int],
    layers: Sequence[int],
    read: Callable[[int, States, range], T],
) -> list[T]:
    is_last = part.stop == ids.shape[1]
    with captured(host.profile.layers, layers) as states:
        reader.read(ids[:, part.start : part.stop], is_last=is_last, model=host.model.base_model)
    return [read(i, {n: states[n][r] for n in layers}, part) for r, i in enumerate(group)]


def tokens_at(answer: Answer, position: Position) -> slice:
    """Return which tokens of an answer are read.

    Raises:
        DataError: the answer is too short for the index.
    """
    first, end = answer.n_prompt, len(answer.ids) - answer.n_end
    if position == "mean":
        return slice(first, end)
    if position == "last":
        return slice(end - 1, end)
    index = int(position)
    at = end + index if index < 0 else first + index
    if not first <= at < end:
        raise DataError(
            f"Position {index} is outside an answer of {end - first} tokens; use 'mean' or 'last'."
        )
    return slice(at, at + 1)

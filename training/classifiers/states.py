"""Hidden states of examples at chosen layers, one or more rows a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from trimtab.steering.errors import DataError
from trimtab.training.calibration import Progress
from trimtab.training.scoring import Answer
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.activations import States, each_answer

Position = Literal["last", "answer", "both"]
POSITIONS: tuple[str, ...] = get_args(Position)
MAX_STATE_BYTES = 2 * 2**30
MAX_ROWS_A_TEXT = 16


@dataclass(frozen=True, eq=False)
class Rows:
    """Hidden states of tokens.

    Attributes:
        states: `[n_rows, n_layers, hidden_size]`, float32, on the CPU.
        owner: which text each row belongs to, `[n_rows]`, int64, ascending.
    """

    states: torch.Tensor
    owner: torch.Tensor


def tokens_read(answer: Answer, position: Position, *, most: int = MAX_ROWS_A_TEXT) -> list[int]:
    """Return the places of the tokens that are read.

    Args:
        answer: a prompt with or without an answer; an end mark is not read.
        position: `last`, the last token, of the prompt if there is no answer: the state that
            predicts the answer's first token; `answer`, its tokens; `both`, the prompt's last
            token and the answer's.
        most: of a long answer that many tokens, evenly spaced with its last among them.

    Raises:
        DataError: the answer's tokens of a text without an answer.
    """
    first, end = answer.n_prompt, len(answer.ids) - answer.n_end
    if position == "last":
        return [end - 1]
    if first == end:
        raise DataError(
            f"Position {position!r} reads answers, and there is a prompt without one; use 'last'."
        )
    places = list(range(first, end))
    if len(places) > most:
        places = [places[(k + 1) * len(places) // most - 1] for k in range(most)]
    # A text without a prompt has an attention sink in front of it, which says nothing of the text.
    return [first - 1, *places] if position == "both" and first > 1 else places


def layers_at_once(n_rows: int, n_layers: int, hidden_size: int) -> int:
    """Return how many layers' states may be held together.

    Raises:
        DataError: not even one layer's.
    """
    fitting = MAX_STATE_BYTES // (4 * n_rows * hidden_size)
    if fitting < 1:
        raise DataError(
            f"{n_rows} rows of width {hidden_size} take over {MAX_STATE_BYTES} bytes a layer; "
            "give fewer texts, or read position 'last'."
        )
    return min(n_layers, fitting)


def read_rows(
    host: SteeredModel,
    answers: Sequence[Answer],
    places: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Return the states of tokens at some decoder layers' outputs.

    Args:
        host: the model, unsteered.
        answers: texts as tokens.
        places: of each text the tokens to read, ascending.
        layers: 0-based; layer l is the output of decoder block l, where steering acts.
        progress: called with texts done and in all.
    """
    starts = [0]
    for text in places:
        starts.append(starts[-1] + len(text))
    # Made outside inference mode: training has to be able to keep it for its backward pass.
    states = torch.zeros(starts[-1], len(layers), host.profile.ref.hidden_size)

    def read(i: int, found: States, part: range) -> torch.Tensor:
        own = [at - part.start for at in places[i] if at in part]
        return torch.stack([found[layer][own].float().cpu() for layer in layers], dim=1)

    following = starts[:-1]
    for i, found in each_answer(host, answers, layers=layers, read=read, progress=progress):
        states[following[i] : following[i] + len(found)] = found
        following[i] += len(found)
    owner = torch.repeat_interleave(
        torch.arange(len(places)), torch.tensor([len(text) for text in places])
    )
    return Rows(states, owner)


def each_layer(
    host: SteeredModel,
    answers: Sequence[Answer],
    places: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    progress: Progress | None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (layer, states `[n_rows, d]`, owner `[n_rows]`), as many layers a pass as fit."""
    at_once = layers_at_once(sum(map(len, places)), len(layers), host.profile.ref.hidden_size)
    groups = [layers[at : at + at_once] for at in range(0, len(layers), at_once)]
    n_texts = len(answers)
    for turn, group in enumerate(groups):

        def reading(done: int, total: int, before: int = turn * n_texts) -> None:
            if progress is not None:
                progress("reading hidden states", before + done, len(groups) * n_texts)

        rows = read_rows(host, answers, places, layers=group, progress=reading)
        for k, layer in enumerate(group):
            yield layer, rows.states[:, k], rows.owner

"""Hidden states of answers at every decoder layer, one vector a pair and side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from trimtab.steering.errors import DataError
from trimtab.steering.model.hooks import captured
from trimtab.training.scoring import Answer
from trimtab.training.steered_model import SteeredModel, batches

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


@torch.inference_mode()
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
    for i, states in each_answer(host, answers, layers=range(n_layers), progress=progress):
        tokens = _tokens(answers[i], position)
        for layer in range(n_layers):
            result[i, layer] = states[layer][tokens].float().mean(0).cpu()
    return result


@torch.inference_mode()
def each_answer(
    host: SteeredModel,
    answers: Sequence[Answer],
    *,
    layers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, dict[int, torch.Tensor]]]:
    """Yield (number of the answer, layer -> its tokens' states), texts of similar length together.

    States are `[at least its tokens, hidden_size]`, outputs of those decoder layers on the model's
    device in its dtype, and live until the next step.
    """
    done = 0
    for group in batches([len(a.ids) for a in answers]):
        rows = [answers[i] for i in group]
        with captured(host.profile.layers, layers) as states:
            host.model.base_model(input_ids=host.pad([r.ids for r in rows]), use_cache=False)
        for r, i in enumerate(group):
            yield i, {layer: states[layer][r] for layer in layers}
        states.clear()
        done += len(group)
        if progress is not None:
            progress(done, len(answers))


def _tokens(answer: Answer, position: Position) -> slice:
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

"""Hidden states after a prompt, with some of its tokens masked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from trimtab.attribution import tree
from trimtab.attribution.baselines import baseline_row
from trimtab.attribution.errors import AttributionError
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.slices import Slices, directly
from trimtab.attribution.subject import Subject
from trimtab.attribution.tree import Tree, Trunk
from trimtab.steering.model.hooks import captured


def last_states(
    subject: Subject,
    prompt: Prompt,
    masked: Sequence[Sequence[int]],
    *,
    mask: str,
    answers: Sequence[Sequence[int]] = (),
    slices: Slices = directly,
) -> torch.Tensor:
    """Return each variant's hidden states at the prompt's last token, or over its answers.

    A masked token keeps its place, so all others keep their positions.

    Args:
        subject: the model, unsteered.
        prompt: what it reads.
        masked: for each variant the numbers of the prompt tokens to mask; none leaves it as it is.
        mask: what stands in for a masked token, a name of `baselines.BASELINES`; with `drop` no
            other token attends to it.
        answers: tokens of answers that follow the prompt, each on its own. With any, the mean over
            each answer's tokens is taken, and the mean of those.
        slices: where each pass of the model runs.

    Returns:
        `[n_variants, n_layers, d_model]`, float32, on the CPU.

    Raises:
        AttributionError: an unknown mask, or `drop` on a model that does more than attend.
    """
    can_hide = subject.tree_problem is None
    if mask == "drop" and not can_hide:
        raise AttributionError(
            f"Tokens cannot be hidden from this model ({subject.tree_problem}); mask with 'pad', "
            "'mean' or 'zero'.",
            param="params.mask",
        )
    substitute = baseline_row(subject, mask)
    is_masked = torch.zeros(len(masked), len(prompt.tokens), dtype=torch.bool)
    for row, numbers in zip(is_masked, masked, strict=True):
        row[list(numbers)] = True
    is_masked = is_masked.to(subject.device)
    embeddings = subject.embeddings(prompt.ids)
    rows = embeddings.expand(len(masked), -1, -1)
    if mask != "drop":
        rows = torch.where(is_masked.unsqueeze(-1), substitute, rows)
    tails = [subject.embeddings(a).expand(len(masked), -1, -1) for a in answers]
    if not can_hide:
        tails = tails or [rows[:, :0]]
        each = [_read(subject, torch.cat([rows, tail], dim=1), None, slices) for tail in tails]
        return torch.stack([_after(x, rows.shape[1]) for x in each]).mean(0)
    # What stands before the first word is the same in every variant.
    n_before = prompt.content[0]
    trunk = Trunk()
    if n_before:
        at = Tree(trunk, n_before, (), subject.device, keeps=True)
        _read(subject, embeddings[None, :n_before], at, slices)
        trunk.n_tokens = n_before
    n_stem = rows.shape[1] - n_before
    hidden = is_masked[:, n_before:] if mask == "drop" else None
    lengths = [tail.shape[1] for tail in tails]
    at = Tree(trunk, n_stem, tuple(lengths), subject.device, hidden=hidden)
    states = _read(subject, torch.cat([rows[:, n_before:], *tails], dim=1), at, slices)
    stem, *branches = states.split([n_stem, *lengths], dim=2)
    return torch.stack([x.mean(2) for x in branches]).mean(0) if branches else stem[:, :, -1]


def _after(states: torch.Tensor, n_prompt: int) -> torch.Tensor:
    """Return the mean of what follows the prompt, or its last state if nothing does."""
    after = states[:, :, n_prompt:]
    return after.mean(2) if after.shape[2] else states[:, :, -1]


def _read(subject: Subject, rows: torch.Tensor, at: Tree | None, slices: Slices) -> torch.Tensor:
    """Return all hidden states, `[n_rows, n_layers, n_tokens, d_model]`, float32, on the CPU."""
    n_layers = len(subject.layers)

    def work() -> torch.Tensor:
        with torch.inference_mode(), ExitStack() as stack:
            where: dict[str, Any] = {}
            if at is not None:
                stack.enter_context(tree.attending(subject.configs, at))
                where["position_ids"] = at.positions()
            states = stack.enter_context(captured(subject.layers, range(n_layers)))
            subject.model.base_model(inputs_embeds=rows.to(subject.dtype), use_cache=False, **where)
        return torch.stack([states[layer].float().cpu() for layer in range(n_layers)], dim=1)

    return slices(work)

"""Hidden states at a prompt's end, with some of its tokens masked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from trimtab.attribution import tree
from trimtab.attribution.baselines import baseline_row
from trimtab.attribution.errors import AttributionError
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.subject import Subject
from trimtab.attribution.tree import Tree, Trunk
from trimtab.steering.model.hooks import captured


@torch.inference_mode()
def last_states(
    subject: Subject, prompt: Prompt, masked: Sequence[Sequence[int]], *, mask: str
) -> torch.Tensor:
    """Return each variant's hidden states at the prompt's last token.

    A masked token keeps its place, so all others keep their positions.

    Args:
        subject: the model, unsteered.
        prompt: what it reads.
        masked: for each variant the numbers of the prompt tokens to mask; none leaves it as it is.
        mask: what stands in for a masked token, a name of `baselines.BASELINES`; with `drop` no
            other token attends to it.

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
    n_layers = len(subject.layers)
    with captured(subject.layers, range(n_layers)) as states:
        if not can_hide:
            _read(subject, rows, None)
        else:
            # What stands before the first word is the same in every variant.
            n_before = prompt.content[0]
            trunk = Trunk()
            if n_before:
                _read(
                    subject,
                    embeddings[None, :n_before],
                    Tree(trunk, n_before, (), subject.device, keeps=True),
                )
                trunk.n_tokens = n_before
            hidden = is_masked[:, n_before:] if mask == "drop" else None
            at = Tree(trunk, rows.shape[1] - n_before, (), subject.device, hidden=hidden)
            _read(subject, rows[:, n_before:], at)
    last = [states[layer][:, -1].float().cpu() for layer in range(n_layers)]
    return torch.stack(last, dim=1)


def _read(subject: Subject, rows: torch.Tensor, at: Tree | None) -> None:
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        if at is not None:
            stack.enter_context(tree.attending(subject.configs, at))
            where["position_ids"] = at.positions()
        subject.model.base_model(inputs_embeds=rows.to(subject.dtype), use_cache=False, **where)

"""Which tokens of a forward pass each classifier guides at a layer, and the guiding itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.kernels import Goals, guide
from trimtab.steering.bank import Bank
from trimtab.steering.plan import Guide


@dataclass(frozen=True, eq=False)
class GuidanceWork:
    """Tokens that one classifier guides in one go, whatever their labels and steps.

    Attributes:
        lead: one of their guides; they share its classifier, loss and kind of step.
        index: the tokens, `[n]`, int64; None means all.
        goals: each one's, gathered from the bank's table.
        parts: each one's part, whose gate holds for it, `[n]`, int64.
        has_rival, has_until, has_norm: whether any of them asks for it.
    """

    lead: Guide
    index: torch.Tensor | None
    goals: Goals
    parts: torch.Tensor
    has_rival: bool
    has_until: bool
    has_norm: bool

    def apply(
        self, hidden: torch.Tensor, *, bank: Bank, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the pass's hidden states with these tokens guided.

        Args:
            hidden: `[n_tokens, d_model]`; not changed.
            bank: where goals and classifiers are.
            gates: `[n_tokens, n_parts]`, float32; None means all open.
        """
        classifier = bank.readers.of(self.lead.reader)
        goals = self.goals
        if gates is not None:
            mine = gates if self.index is None else gates.index_select(0, self.index)
            goals = goals.times(mine.gather(1, self.parts.unsqueeze(1)))
        states = hidden if self.index is None else hidden.index_select(0, self.index)
        guided = guide(
            states,
            classifier,
            goals,
            loss=self.lead.loss,
            step=self.lead.step,
            has_rival=self.has_rival,
            has_until=self.has_until,
            has_norm=self.has_norm,
            has_still=gates is not None,  # a plan has no guide whose steps are all 0
        )
        return guided if self.index is None else hidden.index_copy(0, self.index, guided)


def plan_guidance(
    bank: Bank, layer: int, slots: np.ndarray, spans: Iterable[tuple[slice, tuple[int, ...]]]
) -> list[GuidanceWork]:
    """Return a layer's guidance in the order it has to be done.

    A request's guides act one after the other. Those of different requests that have the same
    place in that order and the same classifier are done together.

    Args:
        bank: what the slots hold.
        layer: decoder layer.
        slots: slot of each token and part, `[n_tokens, n_parts]`; 0 where the part is shut out.
        spans: tokens of each steered span, and its request's slots.
    """
    groups: dict[tuple[int, str, str, str], list[tuple[np.ndarray, int, int, Guide]]] = {}
    for tokens, mine in spans:
        turn = 0
        for part, slot in enumerate(mine):
            if not bank.has_guides[layer, slot]:
                continue
            inside = tokens.start + np.flatnonzero(slots[tokens, part] == slot)
            for one, row in bank.guides[layer, slot]:
                key = (turn, one.reader.digest, one.loss, one.step)
                turn += 1
                if len(inside):
                    groups.setdefault(key, []).append((inside, row, part, one))
    return [_work(bank, groups[key], n_tokens=len(slots)) for key in sorted(groups)]


def _work(
    bank: Bank, members: list[tuple[np.ndarray, int, int, Guide]], *, n_tokens: int
) -> GuidanceWork:
    counts = [len(inside) for inside, _, _, _ in members]
    index = np.concatenate([inside for inside, _, _, _ in members])
    rows = np.repeat([row for _, row, _, _ in members], counts)
    parts = np.repeat([part for _, _, part, _ in members], counts)
    guides = [one for _, _, _, one in members]
    is_whole = len(index) == n_tokens and bool((np.diff(index) == 1).all())

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(bank.device)

    lead = guides[0]
    return GuidanceWork(
        lead=lead,
        index=None if is_whole else on_device(index),
        goals=bank.goals.gather(
            on_device(rows),
            n_labels=len(lead.reader.labels),
            n_steps=max(len(one.sizes) for one in guides),
        ),
        parts=on_device(parts),
        has_rival=any(one.picks_rival for one in guides),
        has_until=any(one.until is not None for one in guides),
        has_norm=any(one.keeps_norm for one in guides),
    )

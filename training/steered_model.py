"""A loaded model with a bank of its own: forward passes over whole batches under a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from trimtab.steering.bank import Bank
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import ModelProfile
from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep


class SteeredModel:
    """What builders and calibration measure on. Not thread-safe; one plan at a time.

    Args:
        loaded: the model.
        profile: its layers and norms.
    """

    def __init__(self, loaded: LoadedModel, profile: ModelProfile) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.profile = profile
        self._bank = Bank(
            n_layers=len(profile.layers),
            hidden_size=profile.ref.hidden_size,
            device=loaded.device,
            max_slots=4,
        )

    @contextmanager
    def under(
        self, plan: Plan | None, *, n_rows: int, n_tokens: int, start: int = 0, n_prompt: int = 0
    ) -> Iterator[None]:
        """Steer the forward passes inside the block.

        Args:
            plan: what to apply to every row; None applies nothing.
            n_rows: rows of the batch.
            n_tokens: tokens of each row.
            start: absolute position of each row's first token.
            n_prompt: length of each row's prompt.
        """
        if plan is None or not plan.parts:
            yield
            return
        lease = self._bank.acquire(plan)
        assert lease is not None  # the bank holds four parts and one plan has at most four
        try:
            request = SteeredRequest(lease, n_prompt)
            step = SteerStep(self._bank, [Span(n_tokens, start, request)] * n_rows)
            with steered(self.profile.layers, step):
                yield
        finally:
            self._bank.release(lease)

    def pad(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return token rows padded on the right, `[n_rows, longest]`, int64.

        Attention is causal, so what is padded behind a row never reaches its tokens.
        """
        longest = max(len(row) for row in rows)
        padded = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(list(row))
        return padded.to(self.device)


def batches(lengths: Sequence[int], *, max_tokens: int = 2048) -> list[list[int]]:
    """Group rows of similar length so that a padded batch holds at most `max_tokens`.

    Returns:
        Lists of row numbers that together name every row once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[i] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups

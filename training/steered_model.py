"""A loaded model with a bank of its own: forward passes over whole batches under a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

import torch

from trimtab.attribution.slices import Slices, directly
from trimtab.attribution.subject import Subject
from trimtab.steering.bank import Bank
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import ModelProfile
from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep

T = TypeVar("T")

_BATCH_TOKENS = 2048
# Tokens of one pass where chats wait for its end: on a CPU 256 take about 0.2 s (a 135M model, two
# cores), as long as what the batch itself reads of a prompt between two tokens of the others; twice
# that if each one's prediction is scored.
_SHARED_TOKENS = {"cpu": 256}
_SHARED_TOKENS_ELSEWHERE = 8192


class SteeredModel:
    """What builders and calibration measure on. Not thread-safe; one plan at a time.

    Args:
        loaded: the model.
        profile: its layers and norms.
        slices: where every use of the model runs; a server's takes turns with its requests.
        slice_tokens: most tokens of one pass; None chooses for a model that is shared, and lets a
            model of one's own take what suits each measure.
        subject: the same model as attribution asks it, if there is one already.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        profile: ModelProfile,
        *,
        slices: Slices = directly,
        slice_tokens: int | None = None,
        subject: Subject | None = None,
    ) -> None:
        if slice_tokens is None and slices is not directly:
            slice_tokens = _SHARED_TOKENS.get(loaded.device.type, _SHARED_TOKENS_ELSEWHERE)
        self.slices = slices
        self.slice_tokens = slice_tokens
        self._given_subject = subject
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

    def run(self, work: Callable[[], T]) -> T:
        """Run a bounded piece of work on the model, in inference mode, and return its result.

        Nothing else may run the model: between two pieces it belongs to others. What a piece puts
        into the model it takes out again.

        Raises:
            CancelledError: the job this is for was called off.
        """

        def piece() -> T:
            with torch.inference_mode():  # a thread's own, so it is entered where the piece runs
                return work()

        return self.slices(piece)

    def rows_at_once(self, n_tokens: int, *, most: int) -> int:
        """Return how many rows of `n_tokens` go through the model together, `most` at most."""
        if self.slice_tokens is None:
            return most
        return max(1, min(most, self.slice_tokens // n_tokens))

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group rows for padded passes; see `batches`."""
        return batches(lengths, max_tokens=min(_BATCH_TOKENS, self.slice_tokens or _BATCH_TOKENS))

    def parts(self, n_rows: int, n_tokens: int) -> list[range]:
        """Return the parts in which rows are read, one pass a part, consecutive.

        A model that does more than attend reads its rows whole, however long: not all of those go
        on from their cache with more than one token, and some that do not say nothing.
        """
        most = n_tokens if self.slice_tokens is None else max(1, self.slice_tokens // n_rows)
        if n_tokens <= most or self.subject.tree_problem is not None:
            return [range(n_tokens)]
        return [range(at, min(at + most, n_tokens)) for at in range(0, n_tokens, most)]

    @cached_property
    def subject(self) -> Subject:
        """The same model, ready to be asked by attribution."""
        if self._given_subject is not None:
            return self._given_subject

        def make() -> Subject:
            with torch.inference_mode(False):  # gradients are taken with what it holds
                return Subject(self.loaded, self.profile)

        return self.slices(make)

    @contextmanager
    def under(
        self, plan: Plan | None, *, n_rows: int, n_tokens: int, start: int = 0, n_prompt: int = 0
    ) -> Iterator[None]:
        """Steer the forward passes inside the block, which is a piece of work or part of one.

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


def batches(lengths: Sequence[int], *, max_tokens: int = _BATCH_TOKENS) -> list[list[int]]:
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

"""Shapley values, sampled over random orders of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.methods.masked_forward import ROWS_A_CALL, masked_forward
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem

MAX_ORDERS = 1024


@dataclass(frozen=True)
class ShapleySampling:
    """What a token adds to F when it joins the others, on average over orders of joining.

    The scores sum to F(x) - F(baseline) for any number of orders, so the sum says nothing about
    how exact each of them is: their error falls with the square root of the number of orders.

    Options:
        orders: orders tried; each reads one row a token.
        paired: follow every order by its reverse, so that what a pair of tokens does together is
            halved between them exactly.
        seed: of the orders.

    Source: Castro et al., Computers & Operations Research 36 (2009), 1726, algorithm 1; paired
    orders: Mitchell et al., arXiv 2104.12199; computed by captum 0.9's
    ShapleyValueSampling.

    Differs: captum draws its orders from torch's global generator, which other threads draw from;
    it is given a generator of orders of our own. It reads our batched forward pass.
    """

    orders: int = 10
    paired: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.orders <= MAX_ORDERS:
            raise AttributionError(
                f"Option 'orders' is {self.orders}; expected 1 to {MAX_ORDERS}.",
                param="params.orders",
            )

    def cost(self, n: int) -> int:
        """Return a row a token and order, and the baseline."""
        return self.orders * n + 1

    def explain(self, problem: Problem) -> Scores:
        """Return each token's mean share and what rounding left of the sum."""
        from captum.attr import ShapleyValueSampling as Captum  # takes a second to import

        ends: dict[bool, float] = {}
        forward = masked_forward(problem)

        def watched(masks: torch.Tensor) -> torch.Tensor:
            values = forward(masks)
            for row, value in zip(masks.sum(1).tolist(), values.tolist(), strict=True):
                if row in (0, problem.n):
                    ends[bool(row)] = value
            return values

        sampling = Captum(watched)
        sampling.permutation_generator = self._orders
        found = sampling.attribute(
            torch.ones(1, problem.n),
            baselines=0.0,
            n_samples=self.orders,
            perturbations_per_eval=min(problem.n, ROWS_A_CALL),
        )
        scores = found[0].double()
        return Scores(scores.float(), residual=ends[True] - ends[False] - float(scores.sum()))

    def _orders(self, n: int, n_orders: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for i in range(n_orders):
            if self.paired and i % 2:
                order = order[::-1]
            else:
                order = torch.randperm(n, generator=generator).tolist()
            yield order

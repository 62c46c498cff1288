"""Random masks in pairs, and the linear function of masks that is closest to F."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

# Penalties tried, in units of what a token's own column weighs.
_PENALTIES = torch.logspace(-6, 1, 15, dtype=torch.float64)
_NO_PENALTY = 1e-10


def uniform_masks(n: int, n_masks: int, generator: torch.Generator) -> torch.Tensor:
    """Return masks that keep each token with probability 1/2, `[n_masks, n]`, bool."""
    return torch.rand(n_masks, n, generator=generator) < 0.5


def kernel_masks(n: int, n_masks: int, generator: torch.Generator) -> torch.Tensor:
    """Return masks drawn by the Shapley kernel, `[n_masks, n]`, bool; `n` is at least 2."""
    sizes = torch.arange(1, n, dtype=torch.float64)
    drawn = torch.multinomial(
        1 / (sizes * (n - sizes)), n_masks, replacement=True, generator=generator
    )
    ranks = torch.rand(n_masks, n, generator=generator).argsort(1).argsort(1)
    return ranks <= drawn.unsqueeze(1)


def half_of_all_masks(n: int) -> torch.Tensor:
    """Return one of each pair of complements, those with the first token, `[2^(n-1), n]`, bool."""
    numbers = torch.arange(2 ** (n - 1)).unsqueeze(1)
    rest = (numbers >> torch.arange(n - 1)) % 2 == 0
    return torch.cat([torch.ones(len(rest), 1, dtype=torch.bool), rest], dim=1)


def kernel_weights(masks: torch.Tensor) -> torch.Tensor:
    """Return the Shapley kernel of masks that are neither full nor empty, `[n_masks]`, float64."""
    n = masks.shape[1]
    sizes = masks.sum(1).tolist()
    weights = [(n - 1) / (comb(n, size) * size * (n - size)) for size in sizes]
    return torch.tensor(weights, dtype=torch.float64)


@dataclass
class LinearFit:
    """Scores s with `differences` about equal to (masks - 1/2) s, by ridge regression.

    Args:
        masks: one of each pair, `[n_pairs, n]`, bool.
        differences: (F(mask) - F(complement)) / 2, `[n_pairs]`, float64.
        weights: of the pairs, `[n_pairs]`, float64; None for equal ones, with a penalty chosen by
            leave-one-out error. Weighted pairs are taken to be all there are: no penalty.

    Attributes:
        scores: `[n]`, float64.
        explained: share of the differences' square that is explained, by leave-one-out where a
            penalty was chosen.
    """

    masks: torch.Tensor
    differences: torch.Tensor
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        root = torch.ones(1) if self.weights is None else (self.weights / self.weights.sum()).sqrt()
        columns = (self.masks.double() - 0.5) * root.unsqueeze(1)
        self._left, self._sizes, self._right = torch.linalg.svd(columns, full_matrices=False)
        target = self.differences * root
        scale = float(columns.square().sum()) / self.masks.shape[1] or 1.0
        along = self._left.T @ target
        total = float(target.square().sum())
        self._penalty, error = _NO_PENALTY * scale, 0.0
        if self.weights is None:
            tried = [(self._left_out(target, along, float(p) * scale), p) for p in _PENALTIES]
            error, best = min(tried, key=lambda pair: pair[0])
            self._penalty = float(best) * scale
        else:
            error = float((target - self._left @ along).square().sum())
        self.scores = self._right.T @ (along * self._sizes / (self._sizes.square() + self._penalty))
        self.explained = 1 - error / total if total > 0 else 1.0

    def _left_out(self, target: torch.Tensor, along: torch.Tensor, penalty: float) -> float:
        """Return the squared error of each pair predicted from the others, summed."""
        shrunk = self._sizes.square() / (self._sizes.square() + penalty)
        leverage = (self._left.square() * shrunk).sum(1)
        missed = target - self._left @ (along * shrunk)
        return float((missed / (1 - leverage)).square().sum())

    def with_sum(self, total: float) -> torch.Tensor:
        """Return the scores of the best fit whose sum is `total`, `[n]`, float64."""
        ones = torch.ones_like(self.scores)
        within = self._right @ ones
        direction = self._right.T @ (within / (self._sizes.square() + self._penalty))
        direction += (ones - self._right.T @ within) / self._penalty
        return self.scores + direction * (total - self.scores.sum()) / direction.sum()

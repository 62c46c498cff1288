"""What F loses when whole tokens are taken away in the order of their scores."""

from __future__ import annotations

import torch

from trimtab.attribution.problem import Problem

SHARES = tuple(i / 10 for i in range(11))
"""Shares of the tokens taken away along a curve."""
_HALF = slice(1, 6)  # of the curve's points: 10 % to 50 % taken away


def falling(scores: torch.Tensor) -> torch.Tensor:
    """Return the tokens' numbers, highest score first, `[..., n]`; equal ones keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def rising(scores: torch.Tensor) -> torch.Tensor:
    """Return the tokens' numbers, lowest score first; equal ones keep their order here too."""
    return scores.argsort(dim=-1, stable=True)


def counts(n: int) -> torch.Tensor:
    """Return how many of `n` tokens each of `SHARES` takes away, int64."""
    return torch.tensor([round(share * n) for share in SHARES])


def without_first(order: torch.Tensor, how_many: torch.Tensor) -> torch.Tensor:
    """Return masks that take the first of an order away.

    Args:
        order: tokens' numbers, `[batch, n]`.
        how_many: `[n_masks]`.

    Returns:
        What stays, `[batch, n_masks, n]`, bool.
    """
    return order.argsort(-1).unsqueeze(1) >= how_many.unsqueeze(1)


def area(curve: torch.Tensor, n: int) -> torch.Tensor:
    """Return the mean height of curves over `SHARES` of `n` tokens, trapezoid, `[...]`."""
    return torch.trapezoid(curve, counts(n).to(curve) / n)


def permuted(scores: torch.Tensor, n_permutations: int, seed: int) -> torch.Tensor:
    """Return the scores in random places, `[n_permutations, n]`.

    The places depend on the seed alone, so different scores are permuted into the same orders
    and the same masks stand for all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    ranked = scores.sort(descending=True).values
    rows = torch.empty(n_permutations, len(scores), dtype=scores.dtype)
    for row in rows:
        row[torch.randperm(len(scores), generator=generator)] = ranked
    return rows


def hard_metrics(
    problem: Problem, scores: torch.Tensor, random: torch.Tensor, *, share: float
) -> tuple[dict[str, torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """Take whole tokens away, every mask once, and return what it did to F.

    Args:
        problem: the question.
        scores: `[batch, n]`, float64.
        random: masks for infidelity, `[n_masks, n]`, bool.
        share: of the tokens taken by sufficiency and comprehensiveness.

    Returns:
        Metrics by name, `[batch]` each, float64 (`faithfulness.Faithfulness` says which), and the
        deletion and insertion curves, `[batch, 11]`.
    """
    n = problem.n
    first = torch.tensor([max(1, round(share * n))])
    best_first = falling(scores)
    without_best = without_first(best_first, first)
    groups = (
        without_first(best_first, counts(n)),
        without_first(rising(scores), counts(n)),
        without_best,
        ~without_best,
        random.unsqueeze(0),
    )
    masks, where = torch.cat([g.flatten(0, 1) for g in groups]).unique(dim=0, return_inverse=True)
    values = problem.values_kept(masks).double().cpu()[where]
    parts = values.split([g.shape[0] * g.shape[1] for g in groups])
    deletion, worst_first = (part.view(len(scores), -1) for part in parts[:2])
    value = deletion[:, 0]
    metrics: dict[str, torch.Tensor | None] = {
        "delta_af": area(worst_first, n) - area(deletion, n),
        "aopc": value - deletion[:, _HALF].mean(1),
        "comprehensiveness": value - parts[2],
        "sufficiency": value - parts[3],
        "infidelity": _infidelity(scores @ (~random).double().T, value[0] - parts[4]),
    }
    return metrics, deletion, worst_first.flip(1)


def _infidelity(predicted: torch.Tensor, lost: torch.Tensor) -> torch.Tensor | None:
    """Return the unexplained share of `lost` `[n_masks]` for each row of predictions."""
    total = lost.square().sum()
    if total == 0:
        return None
    along = (predicted @ lost).clamp_min(0).square()
    size = predicted.square().sum(1)
    explained = torch.where(size > 0, along / (size * total).clamp_min(1e-300), 0.0)
    return (1 - explained).clamp_min(0)

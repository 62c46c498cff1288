"""How the answers move when every token loses a share of its embedding, by its score."""

from __future__ import annotations

import torch

from trimtab.attribution.problem import Problem


def keep_rates(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as rates in (0, 1) by rank, mean 1/2, equal scores the same, `[batch, n]`."""
    below = (scores.unsqueeze(-1) > scores.unsqueeze(-2)).double().sum(-1)
    same = (scores.unsqueeze(-1) == scores.unsqueeze(-2)).double().sum(-1)
    return (below + same / 2) / scores.shape[-1]


def hellinger(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the distance of "this token, or another" under two log-probabilities, 0 to 1."""
    p, q = ours.double().exp().clamp(max=1), theirs.double().exp().clamp(max=1)
    common = (p * q).sqrt() + ((1 - p) * (1 - q)).sqrt()
    return (1 - common).clamp_min(0).sqrt()


def soft_metrics(
    problem: Problem, sizes: torch.Tensor, n_draws: int, generator: torch.Generator
) -> dict[str, torch.Tensor | None]:
    """Return soft comprehensiveness and sufficiency, `[batch]` each, float64.

    All rows see the same draws, so that rows differ by their scores alone. A distance has no sign,
    so tokens are ranked by the size of their scores: it does not say which answer gained.

    Args:
        problem: the question.
        sizes: of the scores, `[batch, n]`, float64; only their ranks are used.
        n_draws: draws of each metric.
        generator: of the CPU.
    """
    nothing: dict[str, torch.Tensor | None] = {
        "soft_comprehensiveness": None,
        "soft_sufficiency": None,
    }
    if problem.baseline == "drop":
        return nothing
    inputs, base = problem.inputs, problem.base
    ends = problem.logprobs(torch.stack([inputs, base])).cpu()
    whole = float(hellinger(ends[1], ends[0]).mean())
    if whole == 0:
        return nothing
    draws = torch.rand(n_draws, *inputs.shape, generator=generator).to(inputs.device)
    rates, where = keep_rates(sizes).unique(dim=0, return_inverse=True)
    moved = []
    for rate in rates.to(draws).unsqueeze(-1):  # one row's draws at a time: they are wide
        keep = torch.cat([draws < 1 - rate, draws < rate])
        logprobs = problem.logprobs(torch.where(keep, inputs, base)).cpu()
        moved.append(hellinger(logprobs, ends[0]).mean(1).view(2, n_draws).mean(1))
    lost, kept = (torch.stack(moved)[where] / whole).unbind(1)
    return {"soft_comprehensiveness": lost, "soft_sufficiency": (1 - kept).clamp_min(0)}

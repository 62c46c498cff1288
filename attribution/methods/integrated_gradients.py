"""Integrated gradients over the content tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.methods.quadrature import RULES, rule
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem

MAX_POINTS = 1024


@dataclass(frozen=True)
class IntegratedGradients:
    """The gradient integrated along the straight path from the baseline to the prompt.

    The path is rough on language models: its residual, what the sum of the scores misses of
    F(x) - F(baseline), is always reported as it is before any correction.

    Options:
        points: gradients taken along the path.
        rule: `bisection` halves the interval where the trapezoid misses F's own change most;
            `midpoint`, `gausslegendre` and `trapezoid` use fixed points.
        correct: hand the residual out to the tokens, in proportion to their share of it, so that
            the scores sum to F(x) - F(baseline). It does not make them more accurate.

    Source: Sundararajan et al., arXiv 1703.01365, equation 1; GrAInS, arXiv 2507.18043, for the
    contrastive objective and the zero baseline.

    Differs: template and special tokens stay as they are along the path (with all of them at zero
    the norms of the first layers have no finite gradient).
    """

    points: int = 33
    rule: str = "bisection"
    correct: bool = True

    def __post_init__(self) -> None:
        known = ("bisection", *RULES)
        if self.rule not in known:
            raise AttributionError(
                f"Option 'rule' is {self.rule!r}; expected one of {', '.join(known)}.",
                param="params.rule",
            )
        least = 3 if self.rule == "bisection" else 2
        if not least <= self.points <= MAX_POINTS:
            raise AttributionError(
                f"Option 'points' is {self.points}; expected {least} to {MAX_POINTS}.",
                param="params.points",
            )

    def cost(self, n: int) -> int:
        """Return 3 rows a point, and the two ends where they are no points."""
        return 3 * self.points + (0 if self.rule == "bisection" else 2)

    def explain(self, problem: Problem) -> Scores:
        """Return each token's integral and the residual."""
        path = _Path(problem)
        if self.rule == "bisection":
            path.bisect(self.points)
            parts, residuals = path.by_interval()
            difference = float(path.values[-1] - path.values[0])
            error_bound = float(residuals.abs().sum())
        else:
            nodes, weights = rule(self.rule, self.points)
            path.take([float(x) for x in nodes])
            parts = path.parts * torch.from_numpy(weights).unsqueeze(1)
            ends = problem.values(torch.stack([problem.base, problem.inputs])).double().cpu()
            difference = float(ends[1] - ends[0])
            residuals = (difference - parts.sum()).reshape(1)
            error_bound = float(residuals.abs())
        scores = parts.sum(0)
        residual = difference - float(scores.sum())
        if self.correct:
            scores = scores + _handed_out(parts, residuals)
        return Scores(
            scores.float(),
            residual=residual,
            error_bound=error_bound,
            facts={"corrected": self.correct},
        )


class _Path:
    """What is known of F along the path: points in order, F there, each token's part of dF."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.step = problem.inputs - problem.base
        self.points: list[float] = []
        self.values = torch.zeros(0, dtype=torch.float64)
        self.parts = torch.zeros(0, problem.n, dtype=torch.float64)

    def take(self, points: list[float]) -> None:
        """Measure at more points."""
        at = torch.tensor(points, device=self.step.device)
        rows = self.problem.base + at[:, None, None] * self.step
        values, gradients = self.problem.gradients(rows)
        parts = (gradients * self.step).sum(-1)
        order = sorted(
            range(len(self.points) + len(points)), key=(self.points + points).__getitem__
        )
        everything = self.points + points
        self.points = [everything[i] for i in order]
        self.values = torch.cat([self.values, values.double().cpu()])[order]
        self.parts = torch.cat([self.parts, parts.double().cpu()])[order]

    def by_interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each interval's trapezoid `[n - 1, n_tokens]` and what it misses `[n - 1]`."""
        width = torch.tensor(self.points, dtype=torch.float64).diff().unsqueeze(1)
        parts = (self.parts[1:] + self.parts[:-1]) / 2 * width
        return parts, self.values.diff() - parts.sum(1)

    def bisect(self, n: int) -> None:
        """Measure at `n` points, the ends first, then the middle of whatever is worst."""
        self.take([0.0, 1.0])
        while len(self.points) < n:
            _, missed = self.by_interval()
            worst = int(missed.abs().argmax())
            self.take([(self.points[worst] + self.points[worst + 1]) / 2])


def _handed_out(parts: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
    """Return what each token gets of the residuals, `[n]`, float64.

    Args:
        parts: contributions, `[n_intervals, n]`; one residual may stand for all of them.
        residuals: `[n_intervals]` or `[1]`.
    """
    size = parts.abs() if len(residuals) == len(parts) else parts.abs().sum(0, keepdim=True)
    total = size.sum(1, keepdim=True)
    share = torch.where(total > 0, size / total.clamp_min(1e-300), 1.0 / parts.shape[1])
    return (share * residuals.unsqueeze(1)).sum(0)

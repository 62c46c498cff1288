"""Gradient times input."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem


@dataclass(frozen=True)
class GradientXInput:
    """The gradient at the prompt times the embedding's distance to the baseline.

    On language models of this kind it ranks tokens no better than chance (docs/attribution.md);
    it is here because others report it.

    Source: Shrikumar et al., arXiv 1605.01713; the method of the scripts published with GrAInS
    (duykhuongnguyen/GrAInS@8ad78db, "vanilla").
    """

    def cost(self, n: int) -> int:
        """Return 3: one pass and its gradient."""
        return 3

    def explain(self, problem: Problem) -> Scores:
        """Return (x - baseline) . dF/dx of each token."""
        _, gradient = problem.gradients(problem.inputs.unsqueeze(0))
        return Scores(((problem.inputs - problem.base) * gradient[0]).sum(-1))

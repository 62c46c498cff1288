"""Layer-wise relevance for attention, by one modified gradient."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.lrp import lrp_problem
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem


@dataclass(frozen=True)
class AttnLRP:
    """Relevance that every layer hands on to its inputs: one pass and one gradient.

    Relevance is not conserved through biases and the softmax rule, so no sum is promised, and no
    baseline is involved.

    Source: AttnLRP, arXiv 2402.05602, in the form x . gradient of lxt.efficient; see
    `trimtab.attribution.lrp` for the rules and the authors' statement on patents.
    """

    def cost(self, n: int) -> int:
        """Return 3: one pass and its gradient."""
        return 3

    def explain(self, problem: Problem) -> Scores:
        """Return x . dF/dx of each token with the gradient changed by the rules."""
        reason = lrp_problem(problem.subject.model) or problem.subject.tree_problem
        if reason is not None:
            raise AttributionError(f"{reason}. Use 'kernel_shap' instead.", param="method")
        _, gradient = problem.gradients(problem.inputs.unsqueeze(0), is_lrp=True)
        return Scores((problem.inputs * gradient[0]).sum(-1))

"""Feature ablation: one token taken away at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.attribution.methods.masked_forward import ROWS_A_CALL, masked_forward
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem


@dataclass(frozen=True)
class FeatureAblation:
    """What F loses when one token is taken away and all others stay.

    Also called occlusion or leave-one-out. No sum is promised: two tokens that say the same score
    nothing each, and two that work only together score the whole twice.

    Source: Zeiler and Fergus, arXiv 1311.2901, section 4.2; computed by captum 0.9's
    FeatureAblation.

    Differs: captum's wrapper for language models, LLMAttribution, reads one variant at a time and
    gives wrong numbers with transformers 5, so captum is given our own batched forward pass.
    """

    def cost(self, n: int) -> int:
        """Return a row a token, and the prompt as it is."""
        return n + 1

    def explain(self, problem: Problem) -> Scores:
        """Return F(x) - F(x without the token) of each token."""
        from captum.attr import FeatureAblation as Captum  # takes a second to import

        found = Captum(masked_forward(problem)).attribute(
            torch.ones(1, problem.n),
            baselines=0.0,
            perturbations_per_eval=min(problem.n, ROWS_A_CALL),
        )
        return Scores(found[0].float())

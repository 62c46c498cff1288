"""The methods that score tokens. One line a method; everything else derives from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trimtab.attribution.problem import Problem
from trimtab.steering.registry import MethodCard, Registry

METHODS = {
    "attnlrp": "trimtab.attribution.methods.attnlrp:AttnLRP",
    "feature_ablation": "trimtab.attribution.methods.feature_ablation:FeatureAblation",
    "gradient_x_input": "trimtab.attribution.methods.gradient_x_input:GradientXInput",
    "integrated_gradients": "trimtab.attribution.methods.integrated_gradients:IntegratedGradients",
    "kernel_shap": "trimtab.attribution.methods.kernel_shap:KernelShap",
    "reagent": "trimtab.attribution.methods.reagent:ReAGent",
    "shapley_sampling": "trimtab.attribution.methods.shapley_sampling:ShapleySampling",
}
ALIASES = {
    "gxi": "gradient_x_input",
    "ig": "integrated_gradients",
    "leave_one_out": "feature_ablation",
    "lrp": "attnlrp",
    "mask_fit": "kernel_shap",
    "occlusion": "feature_ablation",
    "shap": "kernel_shap",
    "shapley": "shapley_sampling",
}
DEFAULT = "attnlrp"
WITHOUT_GRADIENTS = "kernel_shap"
"""The default where AttnLRP is not offered or has no rules for the model."""
_REGISTRY = Registry(METHODS, ALIASES)


@dataclass(frozen=True)
class Scores:
    """What a method found.

    Attributes:
        values: one score a content token, `[n]`, float32, nats of F.
        residual: F(x) - F(baseline) minus the sum of the scores as the method found them, before
            any correction; None for a method that promises no sum.
        error_bound: an estimate of how far a method that promises a sum may be off, in nats.
        units: of the values: `nats` of F, or `share` for scores without a direction.
        facts: what the run came to, such as points used, for the result's settings.
    """

    values: torch.Tensor
    residual: float | None = None
    error_bound: float | None = None
    units: str = "nats"
    facts: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """Scores the content tokens of a prompt. A frozen dataclass of options."""

    def explain(self, problem: Problem) -> Scores:
        """Return the tokens' scores.

        Raises:
            AttributionError: the method cannot be used on this model or with this baseline.
        """
        ...

    def cost(self, n: int) -> int:
        """Return the rows `explain` reads for `n` content tokens; a gradient counts two more."""
        ...


def name_of(name: str) -> str:
    """Return a method's own name for a name or an alias."""
    return _REGISTRY.name_of(name)


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return a method with options.

    Raises:
        NotFoundError: unknown method.
        DataError: unknown option or a value of the wrong kind.
    """
    made: Method = _REGISTRY.make(name, options)
    return made


def describe() -> list[MethodCard]:
    """Return a card for each method, by name."""
    return _REGISTRY.describe()

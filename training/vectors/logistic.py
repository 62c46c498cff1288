"""The direction of a logistic probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression

from trimtab.steering.errors import DataError


@dataclass(frozen=True)
class Logistic:
    """The normal of a logistic regression that tells the two sides apart.

    Options:
        c: inverse strength of the L2 penalty, on features scaled to unit mean variance.

    Source: inference-time intervention, arXiv 2306.03341, section 3.2 ("probe weight direction").

    Differs: on the residual stream at a layer's output, not on single attention heads.
    """

    c: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.c < float("inf"):
            raise DataError(f"Option 'c' is {self.c}; expected a number over 0.", param="params.c")

    def fit(
        self,
        preferred: torch.Tensor,
        dispreferred: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return the probes' weights in hidden space, `[n_layers, d]`, float32."""
        labels = [1] * len(preferred) + [0] * len(dispreferred)
        directions = []
        for layer in range(preferred.shape[1]):
            x = torch.cat([preferred[:, layer], dispreferred[:, layer]])
            x = x - x.mean(0)
            # One scale for all features: scaling each by its own would turn the direction.
            scale = x.pow(2).mean().sqrt().clamp_min(1e-12)
            probe = LogisticRegression(C=self.c, max_iter=1000)
            probe.fit((x / scale).numpy(), labels)
            directions.append(torch.from_numpy(probe.coef_[0]) / scale)
            if progress is not None:
                progress(len(directions), preferred.shape[1])
        return torch.stack(directions).float()

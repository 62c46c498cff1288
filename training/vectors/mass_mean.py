"""The mass-mean probe's direction, tilted by the within-class covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.covariance import LedoitWolf


@dataclass(frozen=True)
class MassMean:
    """The difference of means seen through the inverse within-class covariance.

    Source: mass-mean probing, "The Geometry of Truth", arXiv 2310.06824, section 5 (the variant
    for identically distributed data: inverse covariance times the difference of means).

    Differs: the covariance is shrunk (Ledoit-Wolf), since there are fewer pairs than dimensions.
    """

    def fit(
        self,
        preferred: torch.Tensor,
        dispreferred: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return the tilted directions, `[n_layers, d]`, float32."""
        difference = (preferred - dispreferred).mean(0)
        within = torch.cat([preferred - preferred.mean(0), dispreferred - dispreferred.mean(0)])
        directions = []
        for layer in range(within.shape[1]):
            covariance = LedoitWolf(assume_centered=True).fit(within[:, layer].numpy()).covariance_
            matrix = torch.from_numpy(covariance).double()
            directions.append(torch.linalg.solve(matrix, difference[layer].double()))
            if progress is not None:
                progress(len(directions), within.shape[1])
        return torch.stack(directions).float()

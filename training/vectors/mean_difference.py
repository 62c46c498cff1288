"""Difference of means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MeanDifference:
    """The mean of preferred minus dispreferred hidden states.

    Source: contrastive activation addition, arXiv 2312.06681, section 3.1; nrimsky/CAA
    generate_vectors.py.

    Differs: CAA reads the letter of a multiple choice; here the position is the caller's, by
    default the mean over a written answer.
    """

    def fit(
        self,
        preferred: torch.Tensor,
        dispreferred: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return mean(preferred) - mean(dispreferred), `[n_layers, d]`, float32."""
        return (preferred - dispreferred).mean(0)

"""A linear model of F over which tokens are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.methods.mask_fit import (
    LinearFit,
    half_of_all_masks,
    kernel_masks,
    kernel_weights,
    uniform_masks,
)
from trimtab.attribution.methods.registry import Scores
from trimtab.attribution.problem import Problem

MAX_SAMPLES = 16384
# Rank correlation with the fit to 1024 masks (SmolLM2-135M, three prompts of 12 to 21 tokens): 0.82
# to 0.96 from 64 masks, 0.92 to 0.98 from 128; without complements 0.83 to 0.91 and 0.90 to 0.95.
_SAMPLES = 128


@dataclass(frozen=True)
class KernelShap:
    """The linear function of which tokens are there that is closest to F on random masks.

    Scores include what a token does in company, and no gradient is needed. Where the tokens are
    so few that every mask can be read, the scores are exact: Banzhaf values (`uniform`) or
    Shapley values (`shapley`).

    Options:
        samples: masks read, in pairs of complements; an odd number is rounded up.
        weighting: `uniform` keeps each token with probability 1/2; `shapley` draws masks by the
            Shapley kernel, mostly nearly full and nearly empty ones, and makes the scores sum to
            F(x) - F(baseline).
        seed: of the masks.

    Source: Lundberg and Lee, arXiv 1705.07874, theorem 2; pairs of complements: Covert and Lee,
    arXiv 2012.01536.

    Differs: `uniform` is the default, as it ranked tokens best in deletion tests; it promises no
    sum, and its residual says how far F is from linear. Fitted is half the difference between a
    mask and its complement, which cancels what tokens do in pairs, by ridge regression with the
    penalty of least leave-one-out error, so that fewer masks than tokens do no harm.
    """

    samples: int = _SAMPLES
    weighting: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weighting not in ("uniform", "shapley"):
            raise AttributionError(
                f"Option 'weighting' is {self.weighting!r}; expected one of uniform, shapley.",
                param="params.weighting",
            )
        if not 4 <= self.samples <= MAX_SAMPLES:
            raise AttributionError(
                f"Option 'samples' is {self.samples}; expected 4 to {MAX_SAMPLES}.",
                param="params.samples",
            )

    def cost(self, n: int) -> int:
        """Return a row a mask, and the two ends."""
        return 2 + 2 * (2 ** (n - 1) if self._is_exact(n) else self._n_pairs)

    def explain(self, problem: Problem) -> Scores:
        """Return the fitted slopes and what their sum missed before it was set right."""
        n = problem.n
        masks, weights = self._masks(n)
        ends = torch.tensor([[True], [False]]).expand(2, n)
        values = problem.values_kept(torch.cat([ends, masks, ~masks])).double().cpu()
        kept, gone = values[2:].chunk(2)
        fit = LinearFit(masks, (kept - gone) / 2, weights)
        total = float(values[0] - values[1])
        scores = fit.with_sum(total) if self.weighting == "shapley" else fit.scores
        return Scores(
            scores.float(),
            residual=total - float(fit.scores.sum()),
            facts={"masks": 2 * len(masks), "explained": round(fit.explained, 4)},
        )

    @property
    def _n_pairs(self) -> int:
        return (self.samples + 1) // 2

    def _is_exact(self, n: int) -> bool:
        return 2 ** (n - 1) <= self._n_pairs

    def _masks(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return one mask of each pair, and their weights if they are all there are."""
        if self._is_exact(n):
            masks = half_of_all_masks(n)
            if self.weighting == "uniform":
                return masks, torch.ones(len(masks), dtype=torch.float64)
            masks = masks[1:]  # the full mask's weight is infinite: it is the sum, made exact
            return masks, kernel_weights(masks)
        draw = uniform_masks if self.weighting == "uniform" else kernel_masks
        return draw(n, self._n_pairs, torch.Generator().manual_seed(self.seed)), None

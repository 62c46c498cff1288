"""F as a function of which tokens are there, in the form captum asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab.attribution.problem import Problem

# captum builds its masks token by token, `[rows, n]` in int64, before any is read.
ROWS_A_CALL = 256


def masked_forward(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from masks `[batch, n]`, 1 for a token that stays, to F `[batch]`.

    Both are on the CPU, F in float64, so that differences of F are not rounded twice.
    """

    def forward(masks: torch.Tensor) -> torch.Tensor:
        return problem.values_kept(masks > 0.5).cpu().double()

    return forward

"""Round to nearest: every weight by itself, under scales that are all one chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trimtab.kernels.formats import Format, Grid


def rtn(weight: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, Grid]:
    """Round to nearest under scales that just hold each group's largest weight.

    Args:
        weight: `[n_out, n_in]`, any float.
        fmt: the format.

    Returns:
        Codes, `[n_out, n_in]`, uint8, and their grid.

    Source: the baseline of arXiv 2210.17323, section 2 ("RTN").
    """
    return _nearest(weight, fmt.fit(weight, search="amax"))


def mse(
    weight: torch.Tensor, fmt: Format, *, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, Grid]:
    """Round to nearest under the scales with the least squared error.

    Args:
        weight: `[n_out, n_in]`, any float.
        fmt: the format.
        importance: weighs the columns' squared errors, `[n_in]`; the mean square of each input
            makes the error the output's, if inputs were uncorrelated.

    Returns:
        Codes, `[n_out, n_in]`, uint8, and their grid.

    Source: choice of scale by squared error, IST-DASLab/gptq quant.py (`mse=True`); weighing by the
        inputs' second moment is the diagonal of arXiv 2210.17323, equation 1.
    """
    return _nearest(weight, fmt.fit(weight, search="mse", importance=importance))


def _nearest(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
    return grid.encode(weight.float(), columns=slice(0, weight.shape[1])), grid

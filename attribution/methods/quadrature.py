"""Rules that integrate a function over [0, 1] from values at a few points."""

from __future__ import annotations

import numpy as np

RULES = ("gausslegendre", "midpoint", "trapezoid")


def rule(name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights, `[n]` each, float64, weights summing to 1.

    Args:
        name: one of `RULES`. The trapezoid has nodes at both ends, with half weights there
            (captum's `riemann_trapezoid` divides by n instead of n - 1 and so sums to less).
        n: points, at least 1, the trapezoid at least 2.
    """
    if name == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return (nodes + 1) / 2, weights / 2
    if name == "midpoint":
        return (np.arange(n) + 0.5) / n, np.full(n, 1 / n)
    weights = np.full(n, 1 / (n - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, n), weights

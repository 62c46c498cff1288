"""How well probabilities agree with labels: plain numbers for an artifact and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss, roc_auc_score

_BINS = 10
_TINY = 1e-7  # float32 probabilities round to 0 and 1; a log of 0 is no measure


def measures(
    probabilities: torch.Tensor,
    targets: torch.Tensor,
    *,
    labels: Sequence[str],
    is_exclusive: bool,
) -> dict[str, Any]:
    """Return measures of a classifier on rows with known labels.

    Args:
        probabilities: `[n, n_labels]`, 0 to 1.
        targets: whether each row has each label, the same shape.
        labels: their names in order.
        is_exclusive: whether a row has one label, the likeliest; otherwise those over one half.

    Returns:
        Plain JSON: `n`, `accuracy` (rows right; of labels each, decisions right), `macro_f1`,
        `auroc` by label (None where all or none of the rows have it), `log_loss` in nats, `ece`,
        and `confusion` (rows are the truth, columns what was read) or `counts` by label.
    """
    p = probabilities.double().numpy()
    y = targets.numpy() > 0.5
    if is_exclusive:
        truth, read = y.argmax(1), p.argmax(1)
        known = list(range(len(labels)))
        clipped = p.clip(_TINY, 1)
        specific = {
            "accuracy": float((truth == read).mean()),
            # Labels that the rows do not have would count as a score of zero.
            "macro_f1": _f1(truth, read, labels=sorted(set(truth.tolist()))),
            "log_loss": float(
                log_loss(truth, clipped / clipped.sum(1, keepdims=True), labels=known)
            ),
            "ece": calibration_error(p.max(1), truth == read),
            "confusion": confusion_matrix(truth, read, labels=known).tolist(),
        }
    else:
        read = p > 0.5
        specific = {
            "accuracy": float((y == read).mean()),
            "exact_match": float((y == read).all(1).mean()),
            "macro_f1": _f1(y, read, labels=[i for i in range(len(labels)) if y[:, i].any()]),
            "log_loss": float(
                -np.where(y, np.log(p.clip(_TINY, 1)), np.log((1 - p).clip(_TINY, 1))).mean()
            ),
            "ece": calibration_error(p.reshape(-1), y.reshape(-1)),
            "counts": {
                label: {
                    "tp": int((y[:, i] & read[:, i]).sum()),
                    "fp": int((~y[:, i] & read[:, i]).sum()),
                    "fn": int((y[:, i] & ~read[:, i]).sum()),
                    "tn": int((~y[:, i] & ~read[:, i]).sum()),
                }
                for i, label in enumerate(labels)
            },
        }
    auroc = {
        label: float(roc_auc_score(y[:, i], p[:, i])) if 0 < y[:, i].sum() < len(y) else None
        for i, label in enumerate(labels)
    }
    return _rounded({"n": len(y), **specific, "auroc": auroc})


def calibration_error(probabilities: np.ndarray, is_right: np.ndarray) -> float:
    """Return the expected calibration error in ten equal bins.

    Args:
        probabilities: claimed, `[n]`.
        is_right: whether each came true, `[n]`.

    Source: arXiv 1706.04599, equation 3.
    """
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(float(probabilities[inside].sum()) - float(is_right[inside].sum()))
        for inside in (bins == b for b in range(_BINS))
    ]
    return sum(gaps) / max(1, len(probabilities))


def _f1(truth: np.ndarray, read: np.ndarray, *, labels: list[int]) -> float:
    if not labels:
        return 0.0
    return float(f1_score(truth, read, labels=labels, average="macro", zero_division=0.0))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 6) if isinstance(value, float) else value

"""The goals of all live guides in fixed buffers, so that a batch gathers its own by row."""

from __future__ import annotations

import torch

from trimtab.kernels import Goals
from trimtab.steering.classifier import MAX_LABELS
from trimtab.steering.plan import Guide
from trimtab.steering.spec import MAX_STEPS

NEVER = 2.0  # a probability that no label reaches


class GoalTable:
    """One row a guide; row 0 is never taken.

    Args:
        n_rows: guides that can be held.
        device: where the buffers live.
    """

    def __init__(self, n_rows: int, *, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._toward = zeros(n_rows + 1, MAX_LABELS, dtype=torch.bool)
        self._away = zeros(n_rows + 1, MAX_LABELS, dtype=torch.bool)
        self._sizes = zeros(n_rows + 1, MAX_STEPS, dtype=torch.float32)
        self._picks_rival = zeros(n_rows + 1, dtype=torch.bool)
        self._until = zeros(n_rows + 1, dtype=torch.float32)
        self._keeps_norm = zeros(n_rows + 1, dtype=torch.bool)
        self._free = list(range(n_rows, 0, -1))

    @property
    def n_free(self) -> int:
        """Rows that can still be taken."""
        return len(self._free)

    def write(self, guide: Guide) -> int:
        """Take a row for a guide and return its number."""
        row = self._free.pop()
        for labels, table in ((guide.toward, self._toward), (guide.away, self._away)):
            table[row] = False
            table[row, list(labels)] = True
        self._sizes[row] = 0.0
        self._sizes[row, : len(guide.sizes)] = torch.tensor(guide.sizes)
        self._picks_rival[row] = guide.picks_rival
        self._until[row] = NEVER if guide.until is None else guide.until
        self._keeps_norm[row] = guide.keeps_norm
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def gather(self, rows: torch.Tensor, *, n_labels: int, n_steps: int) -> Goals:
        """Return the goals of tokens.

        Args:
            rows: row of each token, `[n_tokens]`, int64.
            n_labels: labels of their classifier.
            n_steps: the most steps any of them takes.
        """
        return Goals(
            toward=self._toward[:, :n_labels].index_select(0, rows),
            away=self._away[:, :n_labels].index_select(0, rows),
            sizes=self._sizes[:, :n_steps].index_select(0, rows),
            picks_rival=self._picks_rival.index_select(0, rows),
            until=self._until.index_select(0, rows),
            keeps_norm=self._keeps_norm.index_select(0, rows),
        )

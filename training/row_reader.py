"""Rows of tokens read in several forward passes, each going on from the model's own cache."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.steering.plan import Plan
from trimtab.training.steered_model import SteeredModel

_CACHES = ("past_key_values", "cache_params")  # attention's name for it, and state-space models'


class RowReader:
    """Reads rows from their first token to their last, some tokens of each a pass.

    Args:
        host: the model.
        plan: acts on every token; None acts on none.
        n_prompt: length of each row's prompt.

    Attributes:
        n_read: tokens of each row read so far.
    """

    def __init__(self, host: SteeredModel, *, plan: Plan | None = None, n_prompt: int = 0) -> None:
        self.n_read = 0
        self._host = host
        self._plan = plan
        self._n_prompt = n_prompt
        self._cache: dict[str, Any] = {}

    def read(self, ids: torch.Tensor, *, is_last: bool, model: Any = None, **options: Any) -> Any:
        """Read the rows' next tokens. It is a piece of work or part of one.

        Args:
            ids: `[n_rows, n_tokens]`, int64.
            is_last: nothing is read after them; rows read in one pass need no cache.
            model: what reads them, the model's inner one or, by default, the whole.
            options: what else the model is called with.

        Returns:
            The model's output.
        """
        n_rows, n_tokens = ids.shape
        under = self._host.under(
            self._plan,
            n_rows=n_rows,
            n_tokens=n_tokens,
            start=self.n_read,
            n_prompt=self._n_prompt,
        )
        use_cache = bool(self._cache) or not is_last
        with under:
            output = (model or self._host.model)(
                input_ids=ids, use_cache=use_cache, **options, **self._cache
            )
        if not is_last:
            self._cache = {name: output[name] for name in _CACHES if output.get(name) is not None}
            assert self._cache  # without one the next pass would see only its own tokens
        self.n_read += n_tokens
        return output

"""One question to the model: F of any input embeddings, and F's gradient, in bounded slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

from trimtab.attribution.baselines import baseline_row
from trimtab.attribution.errors import AttributionError, NonFiniteError, TooLargeError
from trimtab.attribution.lrp import attn_lrp
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.reader import Reader
from trimtab.attribution.slices import Slices, directly
from trimtab.attribution.subject import Subject
from trimtab.steering.model.decoder import text_config
from trimtab.steering.plan import Plan

T = TypeVar("T")


class Problem:
    """F as a function of the embeddings of the prompt's content tokens.

    Template and special tokens are as they are in every evaluation. The prompt before the first
    content token is read once; both answers are read after one pass over the rest of it.

    Args:
        subject: the model.
        prompt: what it reads.
        objective: what F is.
        baseline: what stands in for a token taken away, a name of `baselines.BASELINES`.
        plan: steering of the model under question; None asks the model as it is.
        slices: where the work runs.
        progress: told the number of rows done so far, after each slice.

    Attributes:
        n: content tokens.
        inputs: their embeddings, `[n, d_model]`, float32.
        base: what replaces each, `[n, d_model]`, float32.
        weights: of each answer token in F, `[n_answer_tokens]`, float32.
        forward_rows: rows (variants of the prompt) read so far.
        backward_rows: of those, the ones a gradient was taken of.

    Raises:
        AttributionError: nothing to attribute, or it does not fit into the context.
    """

    def __init__(
        self,
        subject: Subject,
        prompt: Prompt,
        objective: Objective,
        *,
        baseline: str = "zero",
        plan: Plan | None = None,
        slices: Slices = directly,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.subject = subject
        self.prompt = prompt
        self.objective = objective
        self.baseline = baseline
        self.forward_rows = 0
        self.backward_rows = 0
        self._slices = slices
        self._progress = progress
        content = prompt.content
        if not content:
            raise AttributionError(
                "The prompt has no word of its own, only template and special tokens; there is "
                "nothing to attribute to."
            )
        longest = len(prompt.tokens) + max(map(len, objective.answers))
        if longest > subject.profile.max_context:
            raise AttributionError(
                f"Prompt and answer have {longest} tokens; the model attends to "
                f"{subject.profile.max_context}."
            )
        self.n = len(content)
        self._reader = Reader(subject, prompt, objective.answers, plan)
        self.plan = self._reader.plan
        self.inputs = self._reader.inputs
        self.base = baseline_row(subject, baseline).expand_as(self.inputs)
        self.weights = torch.tensor(objective.weights, device=subject.device)

    @property
    def row_tokens(self) -> int:
        """Tokens the model reads for one row."""
        return self._reader.row_tokens

    # --- asking

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return F of each row, `[batch]`, float32.

        Args:
            rows: embeddings of the content tokens, `[batch, n, d_model]`.
        """
        return self._weighted(self.logprobs(rows))

    def values_kept(self, keep: torch.Tensor) -> torch.Tensor:
        """Return F with some tokens taken away, `[batch]`, float32.

        Args:
            keep: `[batch, n]`, bool; False takes the token away.
        """
        return self._weighted(self.logprobs_kept(keep))

    def logprobs_kept(self, keep: torch.Tensor) -> torch.Tensor:
        """Return each answer token's log-probability with some tokens taken away.

        Returns:
            `[batch, n_answer_tokens]`, float32, the preferred answer's tokens first.
        """
        keep = keep.to(self.subject.device).bool()
        parts = []
        for part in keep.split(self._rows_a_slice()):
            hidden = None
            if self.baseline == "drop":
                hidden = torch.zeros(len(part), self._reader.n_stem, dtype=torch.bool)
                hidden = hidden.to(self.subject.device)
                hidden[:, self._reader.where] = ~part
                rows = self.inputs.expand(len(part), -1, -1)
            else:
                rows = torch.where(part.unsqueeze(-1), self.inputs, self.base)
            parts.append(self._slice(rows, hidden=hidden))
        return torch.cat(parts)

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return each answer token's log-probability, `[batch, n_answer_tokens]`, float32."""
        return torch.cat([self._slice(part) for part in rows.split(self._rows_a_slice())])

    def gradients(
        self, rows: torch.Tensor, *, is_lrp: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return F of each row and its gradient with respect to the row.

        Args:
            rows: `[batch, n, d_model]`.
            is_lrp: take AttnLRP's modified gradient.

        Returns:
            values `[batch]` and gradients `[batch, n, d_model]`, float32.

        Raises:
            NonFiniteError: a value or a gradient is NaN or infinite.
            TooLargeError: it needs more memory than there is.
        """
        if self.baseline == "drop":
            raise AttributionError(
                "The baseline 'drop' removes tokens from attention and has no path of embeddings; "
                "give a method of gradients 'zero', 'pad' or 'mean'.",
                param="params.baseline",
            )
        most = min(len(rows), self._rows_a_slice())
        self.subject.check_memory(self.row_tokens, n_logits=len(self.weights), n_rows=most)
        values, gradients = [], []
        for part in rows.split(most):
            value, gradient = self._gradient_slice(part, is_lrp=is_lrp)
            values.append(value)
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def predictions(self, places: Sequence[int]) -> torch.Tensor:
        """Return the model's log-probabilities for some of the content tokens' places.

        Each is predicted from everything before it in the prompt as it is. What stands first in
        the prompt has nothing before it, and every token is equally likely there.

        Args:
            places: numbers of content tokens, 0 to `n` - 1.

        Returns:
            `[len(places), vocab_size]`, float32, on the CPU.
        """
        before = torch.tensor([self.prompt.content[i] - 1 for i in places])
        known = before >= 0

        def work() -> torch.Tensor:
            with torch.inference_mode():
                return self._reader.next_logprobs(before[known].tolist()).cpu()

        vocab = text_config(self.subject.model).vocab_size
        found = torch.full((len(before), vocab), -math.log(vocab))
        if known.any():
            found[known] = self._run(work)
            if not torch.isfinite(found.exp()).all():
                raise NonFiniteError("The model's predictions are not finite on this input.")
            self.forward_rows += 1
            self._tell()
        return found

    # --- running

    def _weighted(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs @ self.weights

    def _rows_a_slice(self) -> int:
        return max(1, self.subject.slice_tokens // self.row_tokens)

    def _slice(self, rows: torch.Tensor, *, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if self._reader.needs_trunk:
            self._run(self._reader.read_trunk)

        def work() -> torch.Tensor:
            with torch.inference_mode():
                return self._reader.logprobs(rows, hidden=hidden)

        # A copy made here: what was made in inference mode can take no part in arithmetic that
        # is differentiated.
        result = self._run(work).clone()
        if not torch.isfinite(result).all():
            raise NonFiniteError("The model's log-probabilities are not finite on this input.")
        self.forward_rows += len(rows)
        self._tell()
        return result

    def _gradient_slice(
        self, rows: torch.Tensor, *, is_lrp: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._reader.needs_trunk:
            self._run(self._reader.read_trunk)

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
                if is_lrp:
                    stack.enter_context(attn_lrp(self.subject.model))
                leaf = rows.detach().clone().requires_grad_()
                values = self._weighted(self._reader.logprobs(leaf, is_lrp=is_lrp))
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
                return values.detach(), gradient

        values, gradient = self._run(work)
        if not (torch.isfinite(values).all() and torch.isfinite(gradient).all()):
            raise NonFiniteError(
                "The gradient is not finite on this input; use a method without gradients."
            )
        self.forward_rows += len(rows)
        self.backward_rows += len(rows)
        self._tell()
        return values, gradient

    def _run(self, work: Callable[[], T]) -> T:
        try:
            return self._slices(work)
        except RuntimeError as error:
            # The check beforehand is an estimate, and others take memory meanwhile. On a CPU torch
            # has no class of its own for it.
            is_full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not is_full:
                raise
            raise TooLargeError(
                f"There was no memory left for a pass over {self.row_tokens} tokens; shorten the "
                "prompt, or try again when less is running."
            ) from None

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.forward_rows + 2 * self.backward_rows)

"""One question to the model: F of any input embeddings, and F's gradient, in bounded slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from trimtab.attribution import tree
from trimtab.attribution.baselines import baseline_row
from trimtab.attribution.errors import AttributionError, NonFiniteError
from trimtab.attribution.lrp import attn_lrp
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.subject import Subject
from trimtab.attribution.tree import Tree, Trunk
from trimtab.steering.model.decoder import text_config
from trimtab.steering.model.hooks import steered
from trimtab.steering.plan import Plan
from trimtab.steering.step import Span, SteeredRequest, SteerStep

T = TypeVar("T")


class Slices(Protocol):
    """Runs a piece of work where and when the model is free, and gives back what it returns.

    A server's runs it on the model's thread between two steps of the batch, and raises
    `CancelledError` instead once the attribution is called off.
    """

    def __call__(self, work: Callable[[], T]) -> T:
        """Run it and return its result."""
        ...


def directly(work: Callable[[], T]) -> T:
    """Run a slice at once, on this thread."""
    return work()


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
        self.plan = plan if plan is not None and plan.parts else None
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
        self.is_tree = subject.tree_problem is None
        whole = self.plan is not None and self.plan.needs_whole_prompt
        self._n_trunk = content[0] if self.is_tree and not whole else 0
        self._trunk: Trunk | None = None
        ids = prompt.ids
        self._stem = subject.embeddings(ids[self._n_trunk :])
        # An answer's last token is predicted and never read.
        self._answers = [
            subject.embeddings(a[:-1] or (0,))[: len(a) - 1] for a in objective.answers
        ]
        self._where = torch.tensor([i - self._n_trunk for i in content], device=subject.device)
        self.inputs = self._stem[self._where]
        self.base = baseline_row(subject, baseline).expand_as(self.inputs)
        self.weights = torch.tensor(objective.weights, device=subject.device)
        self._targets = torch.tensor(
            [t for answer in objective.answers for t in answer], device=subject.device
        )

    @property
    def row_tokens(self) -> int:
        """Tokens the model reads for one row."""
        if self.is_tree:
            return len(self._stem) + sum(len(a) for a in self._answers)
        return sum(len(self._stem) + len(a) for a in self._answers)

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
                hidden = torch.zeros(len(part), len(self._stem), dtype=torch.bool)
                hidden = hidden.to(self.subject.device)
                hidden[:, self._where] = ~part
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
        """
        if self.baseline == "drop":
            raise AttributionError(
                "The baseline 'drop' removes tokens from attention and has no path of embeddings; "
                "give a method of gradients 'zero', 'pad' or 'mean'.",
                param="params.baseline",
            )
        values, gradients = [], []
        for part in rows.split(self._rows_a_slice()):
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
        n = len(self.prompt.tokens)

        def work() -> torch.Tensor:
            with torch.inference_mode(), self._steered([(n, 0)], 1):
                tokens = self.subject.embeddings(self.prompt.ids).unsqueeze(0)
                logits = self._logits(tokens, None, before[known].tolist())
                return logits[0].float().log_softmax(-1).cpu()

        vocab = text_config(self.subject.model).vocab_size
        found = torch.full((len(before), vocab), -math.log(vocab))
        if known.any():
            found[known] = self._slices(work)
            self.forward_rows += 1
            self._tell()
        return found

    # --- running

    def _weighted(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs @ self.weights

    def _rows_a_slice(self) -> int:
        return max(1, self.subject.slice_tokens // self.row_tokens)

    def _slice(self, rows: torch.Tensor, *, hidden: torch.Tensor | None = None) -> torch.Tensor:
        self._read_trunk()

        def work() -> torch.Tensor:
            with torch.inference_mode():
                return self._logprobs(rows, hidden=hidden)

        # A copy made here: what was made in inference mode can take no part in arithmetic that
        # is differentiated.
        result = self._slices(work).clone()
        if not torch.isfinite(result).all():
            raise NonFiniteError("The model's log-probabilities are not finite on this input.")
        self.forward_rows += len(rows)
        self._tell()
        return result

    def _gradient_slice(
        self, rows: torch.Tensor, *, is_lrp: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._read_trunk()

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
                if is_lrp:
                    stack.enter_context(attn_lrp(self.subject.model))
                leaf = rows.detach().clone().requires_grad_()
                values = self._weighted(self._logprobs(leaf, is_lrp=is_lrp))
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
                return values.detach(), gradient

        values, gradient = self._slices(work)
        if not (torch.isfinite(values).all() and torch.isfinite(gradient).all()):
            raise NonFiniteError(
                "The gradient is not finite on this input; use a method without gradients."
            )
        self.forward_rows += len(rows)
        self.backward_rows += len(rows)
        self._tell()
        return values, gradient

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.forward_rows + 2 * self.backward_rows)

    def _read_trunk(self) -> None:
        if self._trunk is not None:
            return
        trunk = Trunk()

        def work() -> None:
            with torch.inference_mode(False), torch.no_grad():
                embeddings = self.subject.embeddings(self.prompt.ids[: self._n_trunk])
                at = Tree(trunk, self._n_trunk, (), self.subject.device, keeps=True)
                with (
                    self._steered([(self._n_trunk, 0)], 1),
                    tree.attending(self.subject.configs, at),
                ):
                    self.subject.model(
                        inputs_embeds=embeddings.to(self.subject.dtype).unsqueeze(0),
                        position_ids=at.positions(),
                        use_cache=False,
                        logits_to_keep=1,
                    )

        if self._n_trunk:
            self._slices(work)
            trunk.n_tokens = self._n_trunk
        self._trunk = trunk

    def _logprobs(
        self, rows: torch.Tensor, *, hidden: torch.Tensor | None = None, is_lrp: bool = False
    ) -> torch.Tensor:
        stem = self._stem.expand(len(rows), -1, -1).index_copy(1, self._where, rows.float())
        if self.is_tree:
            return self._read_tree(stem, hidden=hidden, is_lrp=is_lrp)
        if hidden is not None or is_lrp:
            raise AttributionError(
                f"This model cannot be asked this way: {self.subject.tree_problem}. Use another "
                "method and baseline."
            )
        return self._read_rows(stem)

    def _read_tree(
        self, stem: torch.Tensor, *, hidden: torch.Tensor | None, is_lrp: bool
    ) -> torch.Tensor:
        n_rows, n_stem, _ = stem.shape
        lengths = tuple(len(a) for a in self._answers)
        trunk = self._trunk
        assert trunk is not None
        at = Tree(trunk, n_stem, lengths, self.subject.device, hidden=hidden, is_lrp=is_lrp)
        tokens = torch.cat([stem, *(a.expand(n_rows, -1, -1) for a in self._answers)], dim=1)
        # The prompt's last token predicts the first token of every answer.
        keep = [n_stem - 1, *range(n_stem, n_stem + sum(lengths))]
        source: list[int] = []
        start = 1
        for n in lengths:
            source += [0, *range(start, start + n)]
            start += n
        end = self._n_trunk + n_stem
        spans = [(n_stem, self._n_trunk), *((n, end) for n in lengths if n)]
        with self._steered(spans, n_rows), tree.attending(self.subject.configs, at):
            logits = self._logits(tokens, at.positions(), keep)
        return _chosen(logits[:, source], self._targets)

    def _read_rows(self, stem: torch.Tensor) -> torch.Tensor:
        """Each answer after the whole prompt, for models that cannot read a tree."""
        parts = []
        done = 0
        n_rows, n_stem, _ = stem.shape
        for answer in self._answers:
            n = n_stem + len(answer)
            tokens = torch.cat([stem, answer.expand(n_rows, -1, -1)], dim=1)
            with self._steered([(n, 0)], n_rows):
                logits = self._logits(tokens, None, list(range(n_stem - 1, n)))
            targets = self._targets[done : done + len(answer) + 1]
            parts.append(_chosen(logits, targets))
            done += len(answer) + 1
        return torch.cat(parts, dim=1)

    def _logits(
        self, tokens: torch.Tensor, positions: torch.Tensor | None, keep: list[int]
    ) -> torch.Tensor:
        where: dict[str, Any] = {}
        if positions is not None:
            where["position_ids"] = positions
        output = self.subject.model(
            inputs_embeds=tokens.to(self.subject.dtype),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, device=tokens.device),
            **where,
        )
        logits: torch.Tensor = output.logits
        if logits.shape[1] != len(keep):
            logits = logits[:, keep]
        return logits

    @contextmanager
    def _steered(self, spans: list[tuple[int, int]], n_rows: int) -> Iterator[None]:
        """Steer the forward passes inside the block: `spans` are (tokens, first position)."""
        if self.plan is None:
            yield
            return
        bank = self.subject.bank
        lease = bank.acquire(self.plan)
        assert lease is not None  # the bank holds as many parts as one plan may have
        try:
            n_prompt = len(self.prompt.tokens)
            rows = []
            for _ in range(n_rows):
                request = SteeredRequest(lease, n_prompt)
                rows += [Span(n, start, request) for n, start in spans]
            with steered(self.subject.layers, SteerStep(bank, rows)):
                yield
        finally:
            bank.release(lease)


def _chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log P of each target, `[batch, n]`, float32."""
    logits = logits.float()
    own = logits.gather(2, targets.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    return own - logits.logsumexp(-1)

"""Runs the model on variants of one prompt and on the answers that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.attribution import tree
from trimtab.attribution.errors import AttributionError
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.subject import Subject
from trimtab.attribution.tree import Tree, Trunk
from trimtab.steering.model.hooks import steered
from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep


class Reader:
    """Log-probabilities of the answers, given embeddings of the prompt's content tokens.

    Everything here runs the model: call it on the model's thread, in the caller's own mode of
    gradients. A model that can reads a tree: the prompt before its first content token once
    (`read_trunk`), the rest of it once a variant, and after it every answer.

    Args:
        subject: the model.
        prompt: what it reads, with at least one content token.
        answers: their tokens, at least one each.
        plan: steering; None leaves the model as it is.

    Attributes:
        inputs: embeddings of the content tokens, `[n, d_model]`, float32.
        n_stem: tokens of the prompt that are read for every variant.
        where: places of the content tokens among those, `[n]`, int64.
        row_tokens: tokens the model reads for one variant.
        needs_trunk: True until `read_trunk` has been called, if there is a trunk to read.
    """

    def __init__(
        self,
        subject: Subject,
        prompt: Prompt,
        answers: Sequence[Sequence[int]],
        plan: Plan | None,
    ) -> None:
        self.subject = subject
        self.prompt = prompt
        self.plan = plan if plan is not None and plan.parts else None
        self.is_tree = subject.tree_problem is None
        whole = self.plan is not None and self.plan.needs_whole_prompt
        self._n_trunk = prompt.content[0] if self.is_tree and not whole else 0
        self._trunk = Trunk()
        self.needs_trunk = self._n_trunk > 0
        self._stem = subject.embeddings(prompt.ids[self._n_trunk :])
        self.n_stem = len(self._stem)
        # An answer's last token is predicted and never read.
        self._answers = [subject.embeddings(a)[:-1] for a in answers]
        self._targets = torch.tensor([t for a in answers for t in a], device=subject.device)
        self.where = torch.tensor(
            [i - self._n_trunk for i in prompt.content], device=subject.device
        )
        self.inputs = self._stem[self.where]
        read = [len(a) for a in self._answers]
        self.row_tokens = (
            self.n_stem + sum(read) if self.is_tree else sum(self.n_stem + n for n in read)
        )

    def read_trunk(self) -> None:
        """Read the prompt's constant beginning and keep it."""
        with torch.inference_mode(False), torch.no_grad():
            embeddings = self.subject.embeddings(self.prompt.ids[: self._n_trunk])
            at = Tree(self._trunk, self._n_trunk, (), self.subject.device, keeps=True)
            with self._steered([(self._n_trunk, 0)], 1), tree.attending(self.subject.configs, at):
                self._logits(embeddings.unsqueeze(0), at.positions(), [self._n_trunk - 1])
        self._trunk.n_tokens = self._n_trunk
        self.needs_trunk = False

    def logprobs(
        self, rows: torch.Tensor, *, hidden: torch.Tensor | None = None, is_lrp: bool = False
    ) -> torch.Tensor:
        """Return each answer token's log-probability, `[batch, n_answer_tokens]`, float32.

        Args:
            rows: embeddings of the content tokens, `[batch, n, d_model]`, float32.
            hidden: `[batch, n_stem]`, bool: tokens that nothing attends to; None hides none.
            is_lrp: attention passes gradients on by AttnLRP's rules.

        Raises:
            AttributionError: the model cannot read a tree, which the last two need.
        """
        stem = self._stem.expand(len(rows), -1, -1).index_copy(1, self.where, rows.float())
        if self.is_tree:
            return self._read_tree(stem, hidden=hidden, is_lrp=is_lrp)
        if hidden is not None or is_lrp:
            raise AttributionError(
                f"This model cannot be asked this way: {self.subject.tree_problem}. Use another "
                "method and baseline."
            )
        return self._read_rows(stem)

    def next_logprobs(self, at: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities of what follows some tokens of the prompt as it is.

        Args:
            at: numbers of prompt tokens.

        Returns:
            `[len(at), vocab_size]`, float32.
        """
        tokens = self.subject.embeddings(self.prompt.ids).unsqueeze(0)
        with self._steered([(len(self.prompt.tokens), 0)], 1):
            return self._logits(tokens, None, list(at))[0].float().log_softmax(-1)

    def _read_tree(
        self, stem: torch.Tensor, *, hidden: torch.Tensor | None, is_lrp: bool
    ) -> torch.Tensor:
        n_rows, n_stem, _ = stem.shape
        lengths = tuple(len(a) for a in self._answers)
        at = Tree(self._trunk, n_stem, lengths, self.subject.device, hidden=hidden, is_lrp=is_lrp)
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

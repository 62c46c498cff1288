"""Labelled texts: what a classifier learns from, checked and split by group."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError

from trimtab.steering.classifier import LABEL_PATTERN, MAX_LABELS
from trimtab.steering.errors import DataError, listed
from trimtab.training.scoring import Answer, answer_of
from trimtab.training.steered_model import SteeredModel

MAX_EXAMPLES = 20_000
_LABEL = re.compile(LABEL_PATTERN)
_FIFTHS = 5  # one of five groups is held, one of the other four validates

Chat = tuple[tuple[str, str], ...]
"""Messages, each a (role, content)."""


@dataclass(frozen=True)
class Example:
    """A prompt with or without an answer, and what it is.

    Attributes:
        prompt: messages for the chat template; a string stands before the answer as it is.
        answer: what the model said; empty if only the prompt is to be read.
        labels: its labels; one if labels exclude one another.
        group: examples of one group are never on two sides of the split.
        is_held: whether it is kept for measuring; None leaves it to the split.
        where: the line it was read from, for messages.
    """

    prompt: str | Chat
    answer: str
    labels: tuple[str, ...]
    group: str
    is_held: bool | None = None
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for label in self.labels:
            if not _LABEL.fullmatch(label):
                raise DataError(
                    f"{self._at}label {label[:80]!r} is not allowed: letters, digits, ' ', '.', "
                    "'_' and '-', beginning with a letter or digit, at most 64 characters."
                )
        if len(set(self.labels)) != len(self.labels):
            raise DataError(f"{self._at}a label is given twice.")
        if not self.answer and not self.prompt:
            raise DataError(f"{self._at}there is no text.")

    @property
    def _at(self) -> str:
        return f"{self.where}: " if self.where else ""


@dataclass(frozen=True)
class Split:
    """Row numbers of the three sides, each ascending.

    Attributes:
        fit: weights are learned from these.
        validation: stops training, calibrates probabilities and chooses the layer.
        held: only measured on.
    """

    fit: tuple[int, ...]
    validation: tuple[int, ...]
    held: tuple[int, ...]


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one task.

    Attributes:
        name: what to call the data in an artifact.
        examples: all of them, in the file's order.
        skipped: why rows were left out -> how many.
    """

    name: str
    examples: tuple[Example, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.examples) > MAX_EXAMPLES:
            raise DataError(f"{self.name} has more than {MAX_EXAMPLES} examples.")
        stated = {example.is_held is None for example in self.examples}
        if len(stated) > 1:
            raise DataError(f"{self.name}: some lines state a `split` and some do not.")
        sides: dict[str, bool | None] = {}
        for example in self.examples:
            if sides.setdefault(example.group, example.is_held) != example.is_held:
                raise DataError(
                    f"{self.name}: {example.group[:60]!r} is both held and built from; "
                    "what is measured on must be new to the classifier."
                )

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that occur, sorted."""
        return tuple(sorted({label for example in self.examples for label in example.labels}))

    @property
    def counts(self) -> dict[str, int]:
        """How many examples have each label, by label."""
        return dict(sorted(Counter(x for e in self.examples for x in e.labels).items()))

    @property
    def sha256(self) -> str:
        """Hash of the texts, labels, groups and stated split."""
        rows = [[e.prompt, e.answer, e.labels, e.group, e.is_held] for e in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def check(self, *, is_exclusive: bool, needs_answers: bool = False) -> None:
        """Refuse examples that cannot be learned from.

        Args:
            is_exclusive: whether each has exactly one label.
            needs_answers: whether it is the answers that are read.

        Raises:
            DataError: too few or too many labels, or another number of them on an example than
                the kind of classifier has, or no answer to read.
        """
        fewest = 2 if is_exclusive else 1
        if not fewest <= len(self.labels) <= MAX_LABELS:
            raise DataError(
                f"{self.name} has {len(self.labels)} labels ({listed(self.labels)}); "
                f"{fewest} to {MAX_LABELS} can be told apart."
            )
        for example in self.examples:
            if needs_answers and not example.answer:
                raise DataError(
                    f"{example.where or self.name} is a prompt without an answer; read its last "
                    "token: position 'last'.",
                    param="position",
                )
            if is_exclusive and len(example.labels) != 1:
                raise DataError(
                    f"{example.where or self.name} has {len(example.labels)} labels; exactly one "
                    "is expected where labels exclude one another. Train with --multi-label "
                    "(is_exclusive false)."
                )

    def split(self, *, seed: int) -> Split:
        """Return rows to fit, to validate and to measure on, whole groups each.

        Unless the examples say which are held, one of five groups is, whatever its labels. Of the
        rest one of four validates, label sets in proportion. So what a held row says changes
        nothing that is learned.

        Args:
            seed: chooses the groups.

        Raises:
            DataError: a side without a row, or a label that is not among the rows to fit.
        """
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault(example.group, []).append(i)
        order = sorted(groups)
        random.Random(seed).shuffle(order)
        is_stated = self.examples[0].is_held is not None
        held = {
            group
            for at, group in enumerate(order)
            if (self.examples[groups[group][0]].is_held if is_stated else at % _FIFTHS == 0)
        }
        # Stable: within one label set the shuffled order stays.
        rest = sorted((g for g in order if g not in held), key=lambda g: self._label_set(groups[g]))
        validation = {group for at, group in enumerate(rest) if at % (_FIFTHS - 1) == 1}
        fit = [group for group in rest if group not in validation]
        sides = [sorted(i for g in side for i in groups[g]) for side in (fit, validation, held)]
        found = Split(*(tuple(side) for side in sides))
        self._check(found)
        return found

    def _label_set(self, rows: Sequence[int]) -> list[str]:
        return sorted({label for i in rows for label in self.examples[i].labels})

    def _check(self, split: Split) -> None:
        for name, side in (
            ("fit", split.fit),
            ("validate", split.validation),
            ("measure", split.held),
        ):
            if not side:
                raise DataError(
                    f"{self.name} has nothing left to {name} on; it takes ten or more different "
                    "texts a label, and a hundred make a useful classifier."
                )
        known = set(self._label_set(split.fit))
        for name, side in (("validation", split.validation), ("held", split.held)):
            lost = set(self._label_set(side)) - known
            if lost:
                raise DataError(
                    f"{self.name}: {listed(lost)} occurs among the {name} rows and not among those "
                    "to learn from; give more texts of it."
                )


def tokens_of(tokenizer: Any, example: Example, *, max_context: int) -> Answer:
    """Return an example's tokens; without an answer those of its prompt.

    Args:
        tokenizer: the model's.
        example: what to read.
        max_context: tokens the model attends to.

    Raises:
        DataError: longer than the context, one token only, or messages the template refuses.
    """
    try:
        answer = _tokens(tokenizer, example)
    # Templates are programs: beside Jinja's own errors they end in Python's usual ones.
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{example.where or 'A text'}: the model's chat template refuses it: {reason}."
        ) from error
    if len(answer.ids) > max_context:
        raise DataError(
            f"{example.where or 'A text'} has {len(answer.ids)} tokens; the model attends to "
            f"{max_context}. Shorten it."
        )
    return answer


def _tokens(tokenizer: Any, example: Example) -> Answer:
    prompt, answer = example.prompt, example.answer
    if isinstance(prompt, str):
        if not prompt:
            return answer_of(tokenizer, "", answer)
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
        return Answer((*head, *tail), len(head))
    if not getattr(tokenizer, "chat_template", None):
        text = "\n".join(content for _, content in prompt)
        whole = answer_of(tokenizer, text, answer)
        return whole if answer else Answer(whole.ids[: whole.n_prompt], whole.n_prompt)
    goes_on = prompt[-1][0] == "assistant"
    head = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in prompt],
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    return Answer((*head, *tail), len(head))


def answers_of(host: SteeredModel, data: ExampleSet) -> list[Answer]:
    """Return every example's tokens; see `tokens_of`."""
    longest = host.profile.max_context
    return [tokens_of(host.tokenizer, example, max_context=longest) for example in data.examples]


def targets_of(data: ExampleSet, labels: Sequence[str]) -> torch.Tensor:
    """Return whether each example has each label, `[n, n_labels]`, float32."""
    return torch.tensor(
        [[float(label in example.labels) for label in labels] for example in data.examples]
    )

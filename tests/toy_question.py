"""A toy model asked a small question: what the tests of attribution share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toy_chat import toy_chat
from transformers import PreTrainedModel

from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import Prompt, prompt_from_messages
from trimtab.attribution.subject import Subject
from trimtab.steering.model.profile import profile_model

CONTRAST = Objective((65, 40, 83), (70, 101))


def toy_subject(
    model: PreTrainedModel | None = None, *, slice_tokens: int | None = None
) -> Subject:
    """Return a toy model ready to be asked; by default a Llama of width 32 and 2 layers."""
    loaded = toy_chat(model)
    profile = profile_model(loaded.model, model_id="toy", tokenizer=loaded.tokenizer)
    return Subject(loaded, profile, slice_tokens=slice_tokens)


def toy_prompt(subject: Subject, *contents: str) -> Prompt:
    """Return a conversation; the user begins and speaks last."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return prompt_from_messages(subject.tokenizer, messages)


def toy_problem(
    subject: Subject,
    objective: Objective = CONTRAST,
    *,
    contents: Sequence[str] = ("a cat", "yes", "why?"),
    **options: Any,
) -> Problem:
    """Return a question to a toy: twelve tokens of content, three messages, two answers."""
    return Problem(subject, toy_prompt(subject, *contents), objective, **options)

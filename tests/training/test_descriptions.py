"""Pairs that the model writes itself, from two descriptions."""

from __future__ import annotations

import pytest
import torch
from toy_chat import toy_chat

from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.training.scoring import Generation
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors import descriptions
from trimtab.training.vectors.descriptions import pairs_from_descriptions
from trimtab.training.vectors.neutral import neutral_questions


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


def answering(host, monkeypatch, answer):
    """Let `answer(prompt) -> text` stand in for the model."""

    def fake(_, prompts, n_tokens, **kwargs):
        texts = (answer(host.tokenizer.decode(prompt)) for prompt in prompts)
        return [Generation(tuple(host.tokenizer(text)["input_ids"]), 0.0) for text in texts]

    monkeypatch.setattr(descriptions, "generate", fake)


def test_each_side_is_the_answer_under_its_description(host, monkeypatch):
    """Catches sides exchanged, answers given to another question, and a lost split."""
    answering(host, monkeypatch, lambda prompt: prompt.partition("that is ")[2][:400])
    pairs = pairs_from_descriptions(host, "warm", "cold")
    held = set(neutral_questions(split="held"))
    assert len(pairs.pairs) == len(neutral_questions()) + len(held)
    assert pairs.n_dropped == 0
    for pair in pairs.pairs:
        assert pair.preferred.startswith(f"warm.\n{pair.prompt}")
        assert pair.dispreferred.startswith(f"cold.\n{pair.prompt}")
        assert pair.is_held == (pair.prompt in held)


def test_equal_and_empty_answers_are_dropped_and_counted(host, monkeypatch):
    """Catches pairs without a difference in the data, or dropped without a word."""
    same, empty = neutral_questions()[:2]

    def answer(prompt: str) -> str:
        if same in prompt:
            return "the same"
        if empty in prompt and "cold" in prompt:
            return "  "
        return "one" if "warm" in prompt else "other"

    answering(host, monkeypatch, answer)
    pairs = pairs_from_descriptions(host, "warm", "cold")
    assert pairs.n_dropped == 2
    assert not {same, empty} & {pair.prompt for pair in pairs.pairs}


def test_a_model_that_does_not_tell_them_apart_is_told(host, monkeypatch):
    """Catches a vector built from the few questions that happened to differ."""
    answering(host, monkeypatch, lambda prompt: "the same")
    with pytest.raises(DataError, match="96 of 96"):
        pairs_from_descriptions(host, "warm", "cold")


def test_the_model_writes_the_same_pairs_again(host):
    """Catches chance in the data: a vector from descriptions could not be built twice."""
    seen = []
    torch.manual_seed(1)
    one = pairs_from_descriptions(
        host, "warm", "cold", progress=lambda done, total: seen.append((done, total))
    )
    torch.manual_seed(2)
    assert pairs_from_descriptions(host, "warm", "cold") == one
    assert seen[-1] == (192, 192)
    assert seen == sorted(seen)

"""What the Why tab asks the server, and what it says where nothing can be asked yet."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.serving.openai.attribution_request import AttributionRequest
from trimtab.ui.page.conversation import Answer, Conversation, Piece, Turn
from trimtab.ui.page.run_settings import read_settings
from trimtab.ui.page.why_question import (
    AGAINST,
    STEERED,
    TYPED,
    UNSTEERED,
    WHATS,
    How,
    QuestionError,
    question_of,
    read_options,
)

VECTORS = {"vectors": [{"id": "warm", "scale": 1.0}]}


def answer(text: str, *, finish: str | None = "stop") -> Answer:
    return Answer([Piece(text)] if text else [], finish=finish)


def chat(*, own: Answer | None = None, steered: Answer | None = None, **settings: Any) -> Any:
    before = Turn(
        read_settings({"prompt": "Hi", **VECTORS}), answer("plain hello"), answer("warm hello")
    )
    last = Turn(
        read_settings({"prompt": "Go", **(settings or VECTORS)}),
        own or answer("plain"),
        steered or answer("warm"),
    )
    return Conversation(turns=[before, last])


def bodies(what: str, talk: Conversation, **more: Any) -> list[dict[str, Any]]:
    question = question_of(what, talk, **more)
    return [question.body(is_steered=side, model="m", how=How()) for side in question.sides]


def test_each_answer_is_asked_about_as_it_was_given():
    """Catches the steered answer explained without steering, or after the other side's words."""
    (steered,) = bodies(STEERED, chat())
    assert steered["target"] == "warm"
    assert steered["steering"] == VECTORS
    assert [m["content"] for m in steered["messages"]] == ["Hi", "warm hello", "Go"]
    (plain,) = bodies(UNSTEERED, chat())
    assert plain["target"] == "plain"
    assert "steering" not in plain
    assert [m["content"] for m in plain["messages"]] == ["Hi", "plain hello", "Go"]


def test_steered_against_unsteered_is_a_contrast_of_the_steered_model():
    """Catches the answers in the other order: red would speak for the unsteered one."""
    (body,) = bodies(AGAINST, chat())
    assert (body["preferred"], body["dispreferred"]) == ("warm", "plain")
    assert body["steering"] == VECTORS


def test_a_preset_steers_by_the_models_name():
    """Catches an answer of a preset that is explained without it."""
    (body,) = bodies(STEERED, chat(preset="bright"))
    assert body["model"] == "m:bright"
    assert "steering" not in body


@pytest.mark.parametrize("what", [STEERED, UNSTEERED, AGAINST])
def test_the_difference_asks_the_same_twice(what):
    """Catches two questions that differ in more than the steering."""
    steered, plain = bodies(what, chat(), is_compared=True)
    assert steered.pop("steering") == VECTORS
    assert steered == plain


def test_typed_texts_are_asked_of_the_model_as_it_is():
    """Catches an own prompt that is put after the chat, or steered unasked."""
    texts = {"prompt": "Sky?", "preferred": "Blue", "dispreferred": "Red"}
    (body,) = bodies(TYPED, Conversation(), **texts)
    assert body["messages"] == [{"role": "user", "content": "Sky?"}]
    assert (body["preferred"], body["dispreferred"]) == ("Blue", "Red")
    assert "steering" not in body
    (alone,) = bodies(TYPED, Conversation(), **{**texts, "dispreferred": ""})
    assert alone["target"] == "Blue"
    steered, _ = bodies(TYPED, chat(), is_compared=True, **texts)
    assert steered["steering"] == VECTORS


@pytest.mark.parametrize("what", WHATS)
def test_the_server_takes_what_is_asked(what):
    """Catches a field that the server does not know."""
    how = How("kernel_shap", {"samples": "16"}, is_measured=True)
    question = question_of(
        what, chat(), prompt="P", preferred="a", dispreferred="b", is_compared=True
    )
    for is_steered in question.sides:
        body = question.body(is_steered=is_steered, model="m", how=how)
        read = AttributionRequest.model_validate(body)
        assert read.stream
        assert read.faithfulness
        assert (read.method, read.params) == ("kernel_shap", {"samples": "16"})


@pytest.mark.parametrize(
    ("what", "talk", "more", "said"),
    [
        (STEERED, Conversation(), {}, "Ask something in Chat first"),
        (STEERED, chat(steered=answer("wa", finish=None)), {}, "not complete"),
        (UNSTEERED, chat(own=answer(" ")), {}, "no words"),
        (AGAINST, chat(own=answer("warm")), {}, "the same"),
        (TYPED, chat(), {}, "Type a prompt"),
        (TYPED, chat(), {"prompt": "P", "preferred": "a", "dispreferred": "a"}, "the same"),
        (STEERED, chat(probes=["warm"]), {"is_compared": True}, "Nothing steers"),
        (
            TYPED,
            Conversation(),
            {"prompt": "P", "preferred": "a", "is_compared": True},
            "Nothing steers",
        ),
        ("everything", chat(), {}, "Choose what to explain"),
    ],
)
def test_what_cannot_be_asked_yet_says_what_to_do(what, talk, more, said):
    """Catches a button that does nothing, or a question that means nothing."""
    with pytest.raises(QuestionError, match=said):
        question_of(what, talk, **more)


def test_options_are_read_as_they_are_written():
    """Catches an option that is dropped without a word."""
    assert read_options("samples=256, seed=1  weighting=uniform") == {
        "samples": "256",
        "seed": "1",
        "weighting": "uniform",
    }
    assert read_options("") == {}
    for wrong in ("samples", "=3", "samples=", "seed=1 seed=2"):
        with pytest.raises(QuestionError, match="name=value"):
            read_options(wrong)

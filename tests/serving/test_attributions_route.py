"""POST /v1/attributions and the `attribution` field of a chat, through HTTP on a toy model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from running_server import NAME, Served

QUESTION = "Is the café 👩‍👩‍👧 open? open!"
MESSAGES = [{"role": "user", "content": QUESTION}]


def ask(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": NAME, "messages": MESSAGES, "target": "yes"} | fields
    return served.http.post(
        "/v1/attributions", json={k: v for k, v in body.items() if v is not None}
    )


def found(served: Served, **fields: Any) -> dict[str, Any]:
    answer = ask(served, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def scores(body: dict[str, Any]) -> list[float | None]:
    return [token["score"] for token in body["input"]]


def test_scores_stand_at_their_characters(transformers_served: Served) -> None:
    """Catches offsets in bytes, merged repeats and template tokens that carry a score."""
    body = found(transformers_served)
    text, tokens = body["text"], body["input"]
    assert "".join(token["token"] for token in tokens) == text
    for token in tokens:
        assert text[slice(*token["span"])] == token["token"]
        assert (token["score"] is None) == (token["kind"] != "text")
    own = [token for token in tokens if token["kind"] == "text"]
    assert "".join(token["token"] for token in own) == QUESTION
    assert {token["role"] for token in own} == {"user"}
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    first, second = (
        [
            t["score"]
            for t in own
            if QUESTION.find("open", start)
            <= t["span"][0] - own[0]["span"][0]
            < QUESTION.find("open", start) + 4
        ]
        for start in (0, QUESTION.find("open") + 1)
    )
    assert len(first) == len(second) == 4
    assert first != second


def test_contrast_is_the_difference_of_its_sides(transformers_served: Served) -> None:
    """Catches a contrast that explains one side only, or with its sign turned."""
    served = transformers_served
    yes, no = found(served), found(served, target="no")
    both = found(served, target=None, preferred="yes", dispreferred="no")
    assert both["objective"]["kind"] == "logprob_contrast"
    assert both["objective"]["value"] == pytest.approx(
        yes["objective"]["value"] - no["objective"]["value"], abs=1e-4
    )
    pairs = zip(scores(both), scores(yes), scores(no), strict=True)
    for score, one, other in pairs:
        if score is not None:
            assert one is not None
            assert other is not None
            assert score == pytest.approx(one - other, abs=1e-4)


def test_own_answer_is_the_chat_answer(transformers_served: Served) -> None:
    """Catches an attribution of an answer that the model would not give."""
    body = found(transformers_served, target=None, max_tokens=5)
    chat = transformers_served.chat(messages=MESSAGES, max_tokens=5)
    text = chat.json()["choices"][0]["message"]["content"]
    ids = [token["token_id"] for token in body["output"]]
    assert transformers_served.engine.info.tokenizer.decode(ids) == text


def test_steered_model_is_the_one_that_answers(transformers_served: Served) -> None:
    """Catches an attribution that ignores its steering, or one that leaves it behind."""
    served = transformers_served
    plain = found(served)
    steered = found(served, steering="kind")
    assert steered["steering"]["layers"]
    assert "steering" not in plain
    assert abs(steered["objective"]["value"] - plain["objective"]["value"]) > 1e-3
    zero = found(served, steering="0 kind")
    assert scores(zero) == scores(plain)
    assert scores(found(served)) == scores(plain)


def test_progress_comes_before_the_result(transformers_served: Served) -> None:
    """Catches a stream that is silent until its end, or ends without the result."""
    answer = ask(transformers_served, stream=True, method="ig", params={"points": 9})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *steps, last = events(answer.text)
    assert {step["object"] for step in steps} == {"attribution.progress"}
    done = [step["done"] for step in steps]
    assert done == sorted(done)
    assert steps[-1]["done"] > 0
    assert last["object"] == "attribution"
    whole = found(transformers_served, method="ig", params={"points": 9})
    assert scores(last) == scores(whole)
    assert whole["summary"]["completeness_gap"] == pytest.approx(0, abs=1e-4)


def test_faithfulness_comes_when_asked_for(transformers_served: Served) -> None:
    """Catches scores measured on another question, or a figure without its control."""
    plain = found(transformers_served)
    body = found(transformers_served, faithfulness=True)
    assert "faithfulness" not in plain
    assert scores(body) == scores(plain)
    measured = body["faithfulness"]
    assert measured["deletion"][0] == pytest.approx(plain["objective"]["value"], abs=1e-4)
    assert measured["deletion"][-1] == pytest.approx(plain["objective"]["baseline_value"], abs=1e-4)
    assert measured["delta_af"]["control_sd"] > 0
    assert body["usage"]["forward_passes"] > plain["usage"]["forward_passes"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "other"}, "model"),
        ({"messages": None}, "messages"),
        ({"prompt": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, None),
        ({"target": ""}, "target"),
        ({"target": 3}, "target"),
        ({"preferred": "no"}, "preferred"),
        ({"dispreferred": "yes"}, "dispreferred"),
        ({"method": "igg"}, "method"),
        ({"method": "ig", "params": {"pints": 3}}, "params.pints"),
        ({"method": "ig", "params": {"points": 1}}, "params.points"),
        ({"method": "ig", "params": {"points": 1.5}}, "params.points"),
        ({"method": "ig", "params": {"points": True}}, "params.points"),
        ({"method": "ig", "params": {"rule": "simpson"}}, "params.rule"),
        ({"params": {"points": [3]}}, None),
        ({"baseline": "none"}, "baseline"),
        ({"baseline": "drop"}, "params.baseline"),
        ({"steering": "unknown"}, "steering.vectors[0].id"),
        ({"steering": "huge"}, "steering.vectors[0].scale"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"temperature": 0}, "temperature"),
        ({"target": "x" * 600}, None),
    ],
)
def test_bad_input_is_refused_by_its_path(
    transformers_served: Served, change: dict[str, Any], param: str | None
) -> None:
    """Catches input that is ignored, clamped or fails as a 500."""
    answer = ask(transformers_served, **change)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    if param is not None:
        assert error["param"] == param, error
    assert ask(transformers_served).status_code == 200


def test_chat_answer_brings_its_attribution(transformers_served: Served) -> None:
    """Catches an attribution of other tokens than those sent, or of the wrong choice."""
    served = transformers_served
    plain = served.chat(messages=MESSAGES, n=2, temperature=1, seed=1).json()
    body = served.chat(messages=MESSAGES, n=2, temperature=1, seed=1, attribution={}).json()
    tokenizer = served.engine.info.tokenizer
    for choice, other in zip(body["choices"], plain["choices"], strict=True):
        assert choice["message"] == other["message"]
        output = choice["attribution"]["output"]
        spoken = tokenizer.decode([token["token_id"] for token in output])
        assert spoken == choice["message"]["content"]
    streamed = events(served.chat(messages=MESSAGES, stream=True, attribution={}).text)
    choices = [choice for chunk in streamed for choice in chunk["choices"]]
    own = [choice["attribution"] for choice in choices if "attribution" in choice]
    whole = served.chat(messages=MESSAGES, attribution={}).json()
    assert scores(own[0]) == scores(whole["choices"][0]["attribution"])
    assert len(own) == 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"method": "igg"}, "attribution.method"),
        ({"params": {"points": 3}}, "attribution.params.points"),
        ({"contrast": ""}, "attribution.contrast"),
        ({"target": "yes"}, "attribution.target"),
        (True, "attribution"),
    ],
)
def test_bad_attribution_of_a_chat_is_refused(
    transformers_served: Served, given: Any, param: str
) -> None:
    """Catches a chat that answers first and then has no attribution to give."""
    answer = transformers_served.chat(attribution=given)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_methods_are_listed(transformers_served: Served) -> None:
    """Catches a method that the server has and does not name."""
    listed = transformers_served.http.get("/v1/attributions/methods").json()["data"]
    names = {card["id"] for card in listed}
    assert {"attnlrp", "integrated_gradients"} <= names
    assert all(card["source"] for card in listed)


def test_engine_without_the_model_refuses(fake_served: Served) -> None:
    """Catches a 500, or an invented answer, where the model is elsewhere."""
    answer = ask(fake_served)
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "attribution_unavailable"
    assert fake_served.chat(attribution={}).status_code == 501


def test_attnlrp_can_be_switched_off(serve_toy: Callable[..., Served]) -> None:
    """Catches an operator's switch that only hides the method."""
    served = serve_toy(attnlrp=False)
    answer = ask(served, method="attnlrp")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "method"
    assert ask(served, method="lrp").status_code == 400
    assert found(served)["method"] == "kernel_shap"
    listed = served.http.get("/v1/attributions/methods").json()["data"]
    assert "attnlrp" not in {card["id"] for card in listed}


def test_too_much_work_is_refused_at_once(serve_toy: Callable[..., Served]) -> None:
    """Catches a request that keeps the queue busy for hours."""
    served = serve_toy(attribution_max_tokens=2000)
    assert ask(served).status_code == 200
    answer = ask(served, method="ig", params={"points": 1000})
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "method"

"""Laws of POST /v1/completions, on every engine."""

from __future__ import annotations

from typing import Any

import pytest

GREEDY: dict[str, Any] = {
    "model": "toy", "prompt": "Once", "max_tokens": 12, "temperature": 0,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip


def streamed(served, **fields: Any) -> list[Any]:
    with served.openai.completions.create(stream=True, **fields) as stream:
        return list(stream)


def test_stream_equals_whole(served):
    """Text lost or doubled at chunk borders."""
    whole = served.openai.completions.create(**GREEDY)
    chunks = streamed(served, **GREEDY, stream_options={"include_usage": True})
    assert whole.object == "text_completion"
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12


def test_default_max_tokens_is_openais(served):
    """The legacy route's default is 16, not the whole context."""
    assert (
        served.complete(max_tokens=None, ignore_eos=True).json()["usage"]["completion_tokens"] == 16
    )


def test_prompt_forms(served):
    """A list of ids read as a list of prompts, or the other way round."""
    tokenizer = served.app.state.server.info.tokenizer
    ids = tokenizer("Once")["input_ids"]
    text = served.complete().json()["choices"][0]["text"]
    assert served.complete(prompt=ids).json()["choices"][0]["text"] == text
    for many in (["Once", "Twice"], [ids, tokenizer("Twice")["input_ids"]]):
        answer = served.complete(prompt=many).json()
        assert [c["index"] for c in answer["choices"]] == [0, 1]
        assert answer["choices"][0]["text"] == text
        assert (
            answer["choices"][1]["text"]
            == served.complete(prompt="Twice").json()["choices"][0]["text"]
        )


def test_choices_of_prompts_are_in_openais_order(served):
    """With two prompts and n=2, choices 0 and 1 belong to the first prompt."""
    sampled = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "n": 2}
    both = served.complete(prompt=["Once", "Twice"], **sampled).json()
    first = served.complete(prompt="Once", **sampled).json()
    second = served.complete(prompt="Twice", **sampled).json()
    texts = [c["text"] for c in (*first["choices"], *second["choices"])]
    assert [c["text"] for c in both["choices"]] == texts
    assert both["usage"]["prompt_tokens"] == sum(
        x["usage"]["prompt_tokens"] for x in (first, second)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(served, stream):
    """An echo that is dropped when streaming."""
    answer = served.openai.completions.create(**GREEDY).choices[0].text
    asked = GREEDY | {"echo": True}
    if stream:
        text = "".join(c.choices[0].text for c in streamed(served, **asked))
    else:
        text = served.openai.completions.create(**asked).choices[0].text
    assert text == "Once" + answer


def test_echo_with_logprobs_scores_the_prompt(served):
    """Evaluation harnesses read the prompt's log-probabilities from an echo."""
    tokenizer = served.app.state.server.info.tokenizer
    n = len(tokenizer("Once")["input_ids"])
    scored = served.complete(max_tokens=0, echo=True, logprobs=1).json()
    choice = scored["choices"][0]
    assert choice["text"] == "Once"
    assert scored["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {n}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(x <= 0 for x in logprobs["token_logprobs"][1:])
    assert "".join(logprobs["tokens"]) == "Once"
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    whole = served.complete(max_tokens=3, echo=True, logprobs=1, ignore_eos=True).json()
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == n + 3
    assert whole["choices"][0]["logprobs"]["token_logprobs"][:n] == logprobs["token_logprobs"]


def test_logprobs_lists_are_parallel_streamed_or_not(served):
    """Offsets that start over in every chunk."""
    whole = served.openai.completions.create(**GREEDY, logprobs=2).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == 12
    parts = [
        c.choices[0].logprobs
        for c in streamed(served, **GREEDY, logprobs=2)
        if c.choices[0].logprobs
    ]
    assert [t for part in parts for t in part.tokens] == whole.tokens
    assert [o for part in parts for o in part.text_offset] == whole.text_offset


def test_prompt_logprobs_are_on_the_choice(served):
    """vLLM's shape, which captum's remote provider reads."""
    answer = served.complete(prompt_logprobs=0, max_tokens=0).json()
    entries = answer["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert all(len(entry) == 1 for entry in entries[1:])
    assert answer["choices"][0]["text"] == ""


def test_steered_scoring_has_a_receipt(served):
    """Scoring that forgets the plan returns the unsteered model's numbers."""
    asked = {"prompt_logprobs": 0, "max_tokens": 0, "prompt": "Once upon"}
    steered = served.complete(**asked, steering="1.0 kind").json()
    assert steered["steering"]["choices"][0]["steered_tokens"] > 0
    if type(served.engine).__name__ != "FakeEngine":  # whose scores are made up
        plain = served.complete(**asked).json()
        assert plain["choices"] != steered["choices"]


def test_seed_reproduces(served):
    """A seed that is accepted and ignored."""
    sampled = {"temperature": 1.0, "ignore_eos": True}
    texts = {served.complete(**sampled, seed=5).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    assert served.complete(**sampled, seed=6).json()["choices"][0]["text"] not in texts


def test_logit_bias_reaches_the_sampler(served):
    """A bias of 100 that is accepted and ignored."""
    if type(served.engine).__name__ == "FakeEngine":
        served.complete(logit_bias={"7": 100})
        assert served.engine.seen[-1].sampling.logit_bias == {7: 100}
        return
    tokenizer = served.app.state.server.info.tokenizer
    (token,) = tokenizer("x", add_special_tokens=False)["input_ids"]
    answer = served.complete(logit_bias={str(token): 100}, temperature=1.0).json()
    assert answer["choices"][0]["text"] == "x" * 8

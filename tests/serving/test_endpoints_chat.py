"""Laws of POST /v1/chat/completions, on every engine, through OpenAI's own client."""

from __future__ import annotations

from typing import Any

import pytest

HI: list[Any] = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {
    "model": "toy", "messages": HI, "max_tokens": 12, "temperature": 0,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip
STEER: dict[str, Any] = {"vectors": [{"id": "kind", "scale": 1.0}]}


def steered(**more: Any) -> dict[str, Any]:
    return GREEDY | {"extra_body": {"ignore_eos": True, "steering": STEER}} | more


def streamed(served, **fields: Any) -> list[Any]:
    with served.openai.chat.completions.create(stream=True, **fields) as stream:
        return list(stream)


def test_answer_has_openais_shape(served):
    """A missing id, usage or role breaks typed clients."""
    answer = served.openai.chat.completions.create(**GREEDY)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "toy"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens


def test_stream_equals_whole(served):
    """Text lost or doubled at chunk borders."""
    whole = served.openai.chat.completions.create(**GREEDY)
    chunks = streamed(served, **GREEDY)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert all(c.choices[0].finish_reason is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_usage_comes_last_and_only_if_asked(served):
    """Clients that index choices[0] crash on an unasked chunk without choices."""
    assert all(c.usage is None and c.choices for c in streamed(served, **GREEDY))
    chunks = streamed(served, **GREEDY, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_steering_changes_the_answer_and_is_receipted(served):
    """The worst bug: 200 with unsteered text."""
    plain = served.openai.chat.completions.create(**GREEDY)
    answer = served.openai.chat.completions.create(**steered())
    receipt = answer.steering
    assert answer.choices[0].message.content != plain.choices[0].message.content
    assert receipt["applied"][0]["id"] == "kind"
    assert receipt["layers"] == [1]
    assert 0 < receipt["dose"]["1"] <= 1
    assert len(receipt["fingerprint"]) == 16
    assert receipt["choices"][0]["index"] == 0
    # The last token is sampled and never passes through the model.
    prompt = answer.usage.prompt_tokens
    assert prompt + 11 <= receipt["choices"][0]["steered_tokens"] <= prompt + 12


def test_unsteered_answers_have_no_receipt(served):
    """A receipt on an unsteered answer would be a lie."""
    assert "steering" not in served.chat().json()
    assert all("steering" not in (c.model_extra or {}) for c in streamed(served, **GREEDY))


def test_stream_receipt_is_in_the_finish_chunk(served):
    """A receipt that streams drop leaves the client in the dark."""
    chunks = streamed(served, **steered())
    with_receipt = [c for c in chunks if "steering" in (c.model_extra or {})]
    assert with_receipt == [chunks[-1]]
    assert chunks[-1].choices[0].finish_reason == "length"
    whole = served.openai.chat.completions.create(**steered())
    assert chunks[-1].steering == whole.steering


def test_stream_receipt_of_several_choices_has_its_own_chunk(served):
    """With n > 1 the first choice to finish cannot know the others' receipts."""
    chunks = streamed(served, **steered(n=2), stream_options={"include_usage": True})
    assert [bool(c.choices) for c in chunks[-2:]] == [False, False]
    assert [c["index"] for c in chunks[-2].steering["choices"]] == [0, 1]
    assert chunks[-1].usage.completion_tokens == 24


def test_zero_scale_equals_unsteered(served):
    """Scale 0 that still touches hidden states."""
    plain = served.chat(ignore_eos=True).json()
    spec = {"vectors": [{"id": "kind", "scale": 0}]}
    zero = served.chat(ignore_eos=True, steering=spec).json()
    assert zero["choices"] == plain["choices"]
    assert zero["steering"]["choices"][0]["steered_tokens"] == 0
    assert zero["steering"]["applied"][0]["scale"] == 0


def test_string_object_and_xargs_forms_are_one(served):
    """Three ways in that end in different plans."""
    forms = [
        {"steering": STEER},
        {"steering": "1.0 kind"},
        {"vllm_xargs": {"steering": '{"vectors": [{"id": "kind"}]}'}},
        {"steering": {"vectors": [{"id": "kind", "strength": 1.0}]}},
    ]
    prints = {served.chat(**form).json()["steering"]["fingerprint"] for form in forms}
    assert len(prints) == 1


def test_n_choices_are_seeded_one_after_another(served):
    """Choices that are copies of each other, or seeds that do not reproduce."""
    sampled = GREEDY | {"temperature": 1.0}
    three = served.openai.chat.completions.create(**sampled, n=3, seed=7)
    assert [c.index for c in three.choices] == [0, 1, 2]
    for i, choice in enumerate(three.choices):
        alone = served.openai.chat.completions.create(**sampled, seed=7 + i)
        assert alone.choices[0].message.content == choice.message.content
    assert len({c.message.content for c in three.choices}) > 1
    assert three.usage.completion_tokens == 36
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens


@pytest.mark.parametrize("as_list", [True, False])
def test_stop_cuts_the_text_before_it(served, as_list):
    """A stop string that is shown, or missed when it spans two tokens."""
    whole = served.openai.chat.completions.create(**GREEDY).choices[0].message.content
    stop = whole[4:7]
    answer = served.openai.chat.completions.create(**GREEDY, stop=[stop] if as_list else stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    text = "".join(
        c.choices[0].delta.content or "" for c in streamed(served, **GREEDY, stop=[stop])
    )
    assert text == answer.choices[0].message.content


def test_stop_token_ids_end_the_answer(served):
    """An ignored stop_token_ids runs to the length limit."""
    tokenizer = served.app.state.server.info.tokenizer
    whole = served.openai.chat.completions.create(**GREEDY, logprobs=True)
    tokens = whole.choices[0].logprobs.content
    # A token that is a whole character, so that its text leads back to its id.
    at = next(i for i, token in enumerate(tokens) if token.bytes is not None)
    (token,) = tokenizer(tokens[at].token, add_special_tokens=False)["input_ids"]
    answer = served.chat(ignore_eos=True, max_tokens=12, stop_token_ids=[token]).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == token
    assert answer["usage"]["completion_tokens"] == at + 1


def test_logprobs_one_entry_a_token(served):
    """Log-probabilities that lag behind their tokens, streamed or not."""
    asked = GREEDY | {"logprobs": True, "top_logprobs": 3}
    entries = served.openai.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(entries) == 12
    assert all(len(e.top_logprobs) == 3 for e in entries)
    assert all(e.logprob <= 0 for e in entries)
    assert all(bytes(e.bytes).decode() == e.token for e in entries if e.bytes is not None)
    chunks = streamed(served, **asked)
    flat = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in flat] == [e.token for e in entries]


def test_prompt_logprobs_have_vllms_shape(served):
    """Scoring clients read null, then id -> logprob, rank, decoded_token."""
    answer = served.chat(prompt_logprobs=2, max_tokens=0).json()
    entries = answer["prompt_logprobs"]
    assert len(entries) == answer["usage"]["prompt_tokens"]
    assert entries[0] is None
    assert all(set(e) == {"logprob", "rank", "decoded_token"} for e in entries[1].values())
    assert answer["usage"]["completion_tokens"] == 0


def test_developer_is_system_and_parts_are_joined(served):
    """Content parts or the developer role that reach the model in another form."""
    one = [{"role": "system", "content": "a\nb"}, *HI]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    other = [{"role": "developer", "content": parts}, *HI]
    first, second = served.chat(messages=one).json(), served.chat(messages=other).json()
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_a_last_assistant_message_is_continued(served):
    """A new turn opened after a prefill answers something else."""
    prefill = [*HI, {"role": "assistant", "content": "Sure"}]
    longer = served.chat(messages=prefill).json()["usage"]["prompt_tokens"]
    tokenizer = served.app.state.server.info.tokenizer
    text = tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True) + "Sure"
    assert longer == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_max_tokens_and_max_completion_tokens_are_one(served):
    """Newer clients send only max_completion_tokens."""
    one = served.chat(max_tokens=None, max_completion_tokens=5, ignore_eos=True)
    assert one.json()["usage"]["completion_tokens"] == 5
    both = served.chat(max_tokens=5, max_completion_tokens=5, ignore_eos=True)
    assert both.json()["usage"]["completion_tokens"] == 5


def test_default_max_tokens_fills_the_context(served):
    """A silent default of 16 tokens cuts chat answers short."""
    answer = served.chat(max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == served.app.state.server.info.max_context


def test_labels_do_not_change_the_answer(served):
    """user and metadata that leak into sampling, or are refused though harmless."""
    labels = {
        "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k",
        "store": False, "service_tier": "auto", "modalities": ["text"],
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "tools": None,
        "logit_bias": None, "stop": None, "n": None, "stream_options": None, "steering": None,
    }  # fmt: skip
    assert served.chat(**labels).json()["choices"] == served.chat().json()["choices"]


def test_a_preset_is_a_model(served):
    """Clients that cannot add fields steer by the model's name."""
    served.store.put_preset("nice", spec_of(STEER))
    by_name = served.openai.chat.completions.create(**GREEDY | {"model": "toy:nice"})
    by_field = served.openai.chat.completions.create(**steered())
    assert by_name.choices[0].message.content == by_field.choices[0].message.content
    assert by_name.model == "toy:nice"
    assert by_name.steering == by_field.steering


def test_a_request_adds_to_its_preset(served):
    """The request's own terms that replace the preset's, or get lost."""
    served.store.put_preset("nice", spec_of(STEER))
    answer = served.chat(model="toy:nice", steering="0.5 formal").json()
    assert [a["id"] for a in answer["steering"]["applied"]] == ["kind", "formal"]
    joined = served.chat(steering="1.0 kind + 0.5 formal").json()
    assert answer["steering"]["fingerprint"] == joined["steering"]["fingerprint"]


def spec_of(value):
    from trimtab.steering.spec import parse_spec

    return parse_spec(value)

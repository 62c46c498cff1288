"""Every bad request is refused before the engine, naming the field by its JSON path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VECTOR = {"id": "kind"}


def assert_refused(answer, *, param, status=400, code=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"].endswith((".", ")")), error
    assert code is None or error["code"] == code
    return error


def term(**more: Any) -> dict[str, Any]:
    return {"vectors": [VECTOR | more]}


GUIDED = {"classifier": "tone", "target": ["expert"]}


def guided(**more: Any) -> dict[str, Any]:
    return {"guidance": [GUIDED | more]}


STEERING = [
    ({"vectors": [{"id": "knid"}]}, "steering.vectors[0].id", 404),
    ({"vectors": [VECTOR, {"id": "nope"}]}, "steering.vectors[1].id", 404),
    (term(layers=[2]), "steering.vectors[0].layers[0]", 400),
    (term(layers=[1, -1]), "steering.vectors[0].layers[1]", 400),
    (term(layers=[]), "steering.vectors[0].layers", 400),
    (term(layers=[1, 1]), "steering.vectors[0].layers", 400),
    (term(layers=[1.5]), "steering.vectors[0].layers[0]", 400),
    (term(strenght=1), "steering.vectors[0].strenght", 400),
    (term(scale=1, alpha=1), "steering.vectors[0]", 400),
    (term(scale=[]), "steering.vectors[0].scale", 400),
    (term(apply={"prompt": False, "generation": False}), "steering.vectors[0].apply", 400),
    (term(apply={"prmpt": False}), "steering.vectors[0].apply.prmpt", 400),
    (term(apply={"thinking": True}), "steering.vectors[0].apply.thinking", 400),
    (term(when={"probe": "kind"}), "steering.vectors[0].when", 400),
    (term(when={"probe": "kind", "above": 0.5}), "steering.vectors[0].when.probe", 400),
    ({"vectors": [{"id": "../../etc/passwd"}]}, "steering.vectors[0].id", 400),
    ({"vectors": [{"id": "kind\x00"}]}, "steering.vectors[0].id", 400),
    ({"vectors": [{"id": "a" * 65}]}, "steering.vectors[0].id", 400),
    ({"vectors": [{"id": "huge"}]}, "steering.vectors[0].scale", 400),
    (term(scale=1e30), "steering.vectors[0].scale", 400),
    ({}, "steering", 400),
    ({"vectors": []}, "steering", 400),
    ({"vectors": [VECTOR] * 10_000}, "steering.vectors", 400),
    ({"vectors": {}}, "steering.vectors", 400),
    ({"vectors": [7]}, "steering.vectors[0]", 400),
    ({"guide": []}, "steering.guide", 400),
    ({"guidance": []}, "steering", 400),
    (guided(classifier="tune"), "steering.guidance[0].classifier", 404),
    (guided(classifier="kind"), "steering.guidance[0].classifier", 404),
    (guided(target=["expert", "casul"]), "steering.guidance[0].target[1]", 400),
    (guided(avoid=["nobody"]), "steering.guidance[0].avoid[0]", 400),
    (guided(avoid="expert"), "steering.guidance[0].avoid", 400),
    (guided(avoid_rival="yes"), "steering.guidance[0].avoid_rival", 400),
    (guided(target=["expert"], avoid=["expert"]), "steering.guidance[0]", 400),
    (guided(target=["expert", "expert"]), "steering.guidance[0]", 400),
    (guided(target=[]), "steering.guidance[0]", 400),
    (guided(target=["x" * 65]), "steering.guidance[0].target[0]", 400),
    (guided(target=["expert"] * 17), "steering.guidance[0].target", 400),
    (guided(scale=-1), "steering.guidance[0]", 400),
    (guided(scale=1.1), "steering.guidance[0].scale", 400),
    (guided(dose=0.3), "steering.guidance[0].dose", 400),
    (guided(dose=9.0, over_dose=True), "steering.guidance[0].dose", 400),
    (guided(dose=0.1, scale=1), "steering.guidance[0]", 400),
    (guided(dose=-0.1), "steering.guidance[0].dose", 400),
    (guided(layers=[0]), "steering.guidance[0].layers[0]", 400),
    (guided(steps=0), "steering.guidance[0].steps", 400),
    (guided(steps=17), "steering.guidance[0].steps", 400),
    (guided(decay=0), "steering.guidance[0].decay", 400),
    (guided(until=1.0), "steering.guidance[0].until", 400),
    (guided(loss="hinge"), "steering.guidance[0].loss", 400),
    (guided(reflect=True), "steering.guidance[0]", 400),
    (guided(reflect=True, target=[], avoid=["casual"]), "steering.guidance[0]", 400),
    (guided(when={"probe": "tone", "above": 0.5}), "steering.guidance[0].when.probe", 404),
    (guided(when={"probe": "tone/x", "above": 0.5}), "steering.guidance[0].when.probe", 400),
    (guided(when={"probe": "tone/", "above": 0.5}), "steering.guidance[0].when.probe", 400),
    ({"guidance": [GUIDED, GUIDED]}, "steering.guidance[1].scale", 400),
    ([VECTOR], "steering", 400),
    (7, "steering", 400),
    ("", "steering", 400),
    ("0.8 kind ~ 2", "steering", 400),
    ("1.0 kind" * 10_000, "steering", 400),
    ('{"vectors": [{"id": "kind", "scale": NaN}]}', "steering.vectors[0].scale", 400),
    ('{"vectors": [{"id": "kind", "id": "formal"}]}', "steering", 400),
    ("{" * 5, "steering", 400),
    ('{"a":' * 100_000, "steering", 400),
]


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(("spec", "param", "status"), STEERING, ids=[p for _, p, _ in STEERING])
def test_bad_steering_is_refused_with_its_path(fake_served, route, spec, param, status):
    """Steering that is dropped, clamped or answered with 500."""
    seen = len(fake_served.engine.seen)
    assert_refused(getattr(fake_served, route)(steering=spec), param=param, status=status)
    assert len(fake_served.engine.seen) == seen


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_numbers_that_are_not_finite_are_named(fake_served, word):
    """Python's JSON reads NaN and 1e400; a NaN scale would poison every batch-mate."""
    text = json.dumps({
        "model": "toy", "prompt": "x", "steering": {"vectors": [VECTOR, VECTOR | {"scale": 777}]}
    }).replace("777", word)  # fmt: skip
    answer = fake_served.http.post(
        "/v1/completions", content=text, headers={"content-type": "application/json"}
    )
    assert_refused(answer, param="steering.vectors[1].scale")


def test_dose_error_says_what_to_do(fake_served):
    """A refusal that leaves the user without a next step."""
    error = assert_refused(
        fake_served.chat(steering="1.0 huge"), param="steering.vectors[0].scale",
        code="dose_over_limit",
    )  # fmt: skip
    assert "--max-dose" in error["message"]


def test_unknown_vector_names_the_nearest(fake_served):
    """A bare 404 sends the user to the docs for a typo."""
    error = fake_served.chat(steering={"vectors": [{"id": "formall"}]}).json()["error"]
    assert "Did you mean 'formal'?" in error["message"]


FIELDS = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a", 7]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 2000]}, "stop[0]"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"07": 1}}, "logit_bias.07"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"999999": 1}}, "logit_bias.999999"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"vllm_xargs": {"steering": {"vectors": []}}}, "vllm_xargs.steering"),
    ({"vllm_xargs": {"other": 1}}, "vllm_xargs.other"),
    ({"probes": "tone"}, "probes"),
    ({"probes": ["tone"] * 9}, "probes"),
    ({"probes": ["tone", "tone"]}, "probes[1]"),
    ({"probes": ["../tone"]}, "probes[0]"),
    ({"probes": ["kind"]}, "probes[0]"),
    ({"vllm_xargs": {"steering": "1.0 kind"}, "steering": "1.0 kind"}, "vllm_xargs.steering"),
    ({"vllm_xargs": {"steering": '{"vectors":[{"id":"kind","scale":1e400}]}'}},
     "vllm_xargs.steering.vectors[0].scale"),
    ({"best_of": 2}, "best_of"),
    ({"n": 2, "best_of": 3}, "best_of"),
    ({"temprature": 1}, "temprature"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"model": 7}, "model"),
    ({"model": None}, "model"),
]  # fmt: skip


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_fields_are_refused_by_name(fake_served, route, fields, param):
    """A parameter that is coerced, clamped or ignored."""
    assert_refused(getattr(fake_served, route)(**fields), param=param)


CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "nmae": "n"}]}, "messages[0].nmae"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
     "messages"),
    ({"messages": [{"role": "assistant", "content": " "}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "long" * 200}]}, "messages"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"echo": True}, "echo"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), CHAT)
def test_bad_chats_are_refused_by_name(fake_served, fields, param):
    """Images, tools and roles that vanish on the way to the template."""
    assert_refused(fake_served.chat(**fields), param=param)


PROMPTS = [
    (None, "prompt"), ("", "prompt"), ([], "prompt"), ([[]], "prompt[0]"), ([""], "prompt[0]"),
    (7, "prompt"), ({}, "prompt"), ([1, "a"], "prompt[1]"), (["a", [1]], "prompt[1]"),
    ([["a"]], "prompt[0][0]"), ([5, 10**9], "prompt[1]"), ([5, -1], "prompt[1]"),
    ([[5], [5, True]], "prompt[1][1]"), (["a"] * 65, "prompt"), ("long" * 200, "prompt"),
    ([None], "prompt[0]"), ([True], "prompt[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "param"), PROMPTS, ids=range(len(PROMPTS)))
def test_bad_prompts_are_refused_by_path(fake_served, prompt, param):
    """A mixed or empty prompt that reaches the engine."""
    assert_refused(fake_served.complete(prompt=prompt), param=param)


def test_preset_paths_lead_back_to_the_client(fake_served):
    """After joining a preset with the request's terms, vectors[1] is the request's vectors[0]."""
    from trimtab.steering.spec import parse_spec

    fake_served.store.put_preset("nice", parse_spec("0.5 kind"))
    model = {"model": "toy:nice"}
    answer = fake_served.chat(**model, steering={"vectors": [{"id": "kind", "layers": [9]}]})
    error = assert_refused(answer, param="steering.vectors[0].layers[0]")
    assert "steering.vectors[0].layers[0]" in error["message"]
    gate = {"vectors": [VECTOR], "when": {"probe": "formal", "above": 0.5}}
    assert_refused(fake_served.chat(**model, steering=gate), param="steering.when.probe")
    fake_served.store.put_preset("broken", parse_spec("50 kind"))
    error = assert_refused(fake_served.chat(model="toy:broken"), param="model")
    assert "preset 'broken'" in error["message"]
    assert "\x00" not in error["message"]
    assert_refused(
        fake_served.chat(model="toy:nise"), param="model", status=404, code="model_not_found"
    )
    assert_refused(fake_served.chat(model="tyo"), param="model", status=404, code="model_not_found")


def post(served, content: bytes, **headers: str):
    headers = {"content-type": "application/json"} | headers
    return served.http.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"nul", b"\xff\xfe", b'{"model": "\xc3\x28"}', b"[" * 100_000,
     b'{"a":' * 100_000, b'{"model": "toy", "model": "toy", "prompt": "x"}', b"\xef\xbb\xbf{}",
     b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": "toy", "prompt": "x"} {}'],
    ids=range(13),
)  # fmt: skip
def test_bodies_that_are_not_strict_json_are_refused(fake_served, content):
    """Parsers that guess: BOMs, doubled keys, Latin-1, nesting bombs."""
    assert_refused(post(fake_served, content), param=None)


def test_half_a_surrogate_is_refused_with_its_path(fake_served):
    """Python reads it, the tokenizer dies of it."""
    answer = post(fake_served, b'{"model": "toy", "prompt": ["a", "\\ud800"]}')
    assert_refused(answer, param="prompt[1]")
    assert post(fake_served, b'{"model": "toy", "prompt": "\\ud83d\\ude00"}').status_code == 200


def test_other_content_types_are_refused(fake_served):
    """A web page may post text/plain to a local server without asking the browser's leave."""
    answer = post(fake_served, b"{}", **{"content-type": "text/plain"})
    assert_refused(answer, param=None, status=415)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/steering/vectors/x"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_50_mb_body_is_refused_unread(serve, path, is_streamed):
    """Buffering what will be refused lets a stranger fill the memory."""
    served = serve(max_upload_bytes=2**20)
    read = 0

    def body():
        nonlocal read
        for _ in range(50):
            read += 2**20
            yield b" " * 2**20

    content = body() if is_streamed else b" " * (50 * 2**20)
    method = "PUT" if "vectors" in path else "POST"
    headers = {"content-type": "application/json"}
    answer = served.http.request(method, path, content=content, headers=headers)
    assert_refused(answer, param=None, status=413, code="body_too_large")
    assert served.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405),
     ("PUT", "/v1/steering/vectors/", 404), ("GET", "/v1/completions/", 404)],
)  # fmt: skip
def test_unknown_routes_and_methods_have_openais_body(fake_served, method, path, status):
    """Starlette's plain-text 404 is not what clients parse."""
    assert_refused(fake_served.http.request(method, path), param=None, status=status)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3)
    ),
    max_leaves=6,
)
known = st.sampled_from(
    ["steering", "stop", "n", "logit_bias", "prompt", "seed", "temperature", "stream_options",
     "vllm_xargs", "messages", "echo", "logprobs", "top_k", "user", "tools", "suffix", "max_tokens"]
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=st.dictionaries(known, json_values, max_size=3))
def test_no_json_makes_a_500(fake_served, fields):
    """Whatever is sent is answered, or refused with a path; it never ends in a traceback."""
    prompt = {"model": "toy", "max_tokens": 2, "prompt": "x"}
    chat = {"model": "toy", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    for route, body in (("completions", prompt), ("chat/completions", chat)):
        # Not httpx's own JSON, which refuses to send NaN.
        answer = fake_served.http.post(
            f"/v1/{route}",
            content=json.dumps(body | fields),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code in (200, 400, 404), (fields, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["chat", "complete"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(served, path):
    """Catches seconds of tokenising, on a thread that others need, for a text of any length."""
    text = "a " * 500_000
    if path == "chat":
        answer = served.chat(messages=[{"role": "user", "content": text}])
    else:
        answer = served.complete(prompt=text)
    param = "messages" if path == "chat" else "prompt"
    error = assert_refused(answer, param=param, code="context_length_exceeded")
    assert "characters" in error["message"]

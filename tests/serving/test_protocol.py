"""What surrounds the answers: ids, metrics, docs, and no field of OpenAI's left unanswered."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from trimtab.serving.openai.chat_request import ChatRequest
from trimtab.serving.openai.completion_request import CompletionRequest
from trimtab.serving.openai.unsupported import ONLY, REFUSED


def fields_of(params: Any) -> set[str]:
    every = (
        params.CompletionCreateParamsBase,
        params.CompletionCreateParamsNonStreaming,
        params.CompletionCreateParamsStreaming,
    )
    return set().union(*(one.__annotations__ for one in every))


@pytest.mark.parametrize(
    ("params", "model", "route"),
    [(chat_params, ChatRequest, "chat"), (text_params, CompletionRequest, "complete")],
)
def test_no_field_of_openais_is_unknown(fake_served, params, model, route):
    """A field that OpenAI adds must be honoured or refused by name before we ship."""
    for name in sorted(fields_of(params)):
        if name in model.model_fields:
            continue
        assert name in ONLY or name in REFUSED or name == "best_of", name
        answer = getattr(fake_served, route)(**{name: {"odd": "value"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
        assert answer.json()["error"]["code"] == "unsupported_field"
        assert "does not support" in answer.json()["error"]["message"]


def test_unknown_fields_name_the_nearest(fake_served):
    """A typo that is silently dropped changes nothing and nobody knows why."""
    error = fake_served.chat(sterring="1 kind").json()["error"]
    assert error["code"] == "unknown_field"
    assert "Did you mean 'steering'?" in error["message"]


@pytest.mark.parametrize("given", ["abc-1", "x" * 128, "00-4bf92f3577b34da6-01"])
def test_a_safe_request_id_is_echoed(fake_served, given):
    """Logs of client and server that cannot be matched, on errors least of all."""
    for path in ("/health", "/nope", "/v1/chat/completions"):
        answer = fake_served.http.get(path, headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "<script>", "é".encode(), "a\tb"])
def test_an_unsafe_request_id_is_replaced(fake_served, given):
    """Ids that break logs or headers."""
    answer = fake_served.http.get("/health", headers={"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_metrics_count_what_happened(serve):
    """Dashboards that show other numbers than the answers did."""
    served = serve()
    served.chat(steering="0.5 kind")
    served.complete(n=2, stream=True)
    served.chat(temperature=9)
    served.http.get("/no/such/path")
    assert served.metric("trimtab_completion_tokens_total") == 24
    assert served.metric("trimtab_steered_requests_total") == 1
    receipt = served.chat(steering="0.5 kind").json()
    assert (
        served.metric("trimtab_steered_tokens_total")
        == 2 * (receipt["steering"]["choices"][0]["steered_tokens"])
    )
    assert served.metric("trimtab_dose_count") == 2
    assert served.metric("trimtab_dose_sum") == pytest.approx(2 * receipt["steering"]["dose"]["1"])
    assert served.metric("trimtab_time_to_first_token_seconds_count") == 3
    assert served.metric("trimtab_inter_token_seconds_count") == 7 * 4
    assert served.metric("trimtab_slots") == 8
    assert served.metric("trimtab_requests_running") == 0
    text = served.http.get("/metrics").text
    assert 'trimtab_requests_total{route="/v1/chat/completions",status="200"} 2.0' in text
    assert 'trimtab_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'route="unmatched",status="404"' in text
    assert "/no/such/path" not in text


def test_metrics_of_two_apps_are_apart(serve, fake_served):
    """A process-wide registry refuses the second app in one process."""
    assert serve().metric("trimtab_completion_tokens_total") == 0


def test_docs_have_examples_that_run(fake_served):
    """Examples in /docs that fail when tried are worse than none."""
    document = fake_served.http.get("/openapi.json").json()
    assert fake_served.http.get("/docs").status_code == 200
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            value = example["value"]
            assert value["model"] == "toy"
            value.pop("steering", None)  # its vectors are not in this store
            assert fake_served.http.post(path, json=value).status_code == 200
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "SteeringSpec", "VectorTerm"} <= set(schemas)
    for name in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert name in schemas, name


def test_version_is_the_packages(fake_served):
    """Two places that say different versions."""
    from importlib.metadata import version

    assert fake_served.http.get("/version").json() == {"version": version("trimtab")}


def test_models_list_is_openais(fake_served):
    """Clients pick the model from this list."""
    (model, *_) = fake_served.openai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("toy", "model", "trimtab")
    assert model.max_model_len == 256


def test_the_models_own_name_is_the_default(serve):
    """Without --served-model-name the model's id is the name on the wire."""
    served = serve(served_model_name=None)
    assert served.openai.models.list().data[0].id == "toy/model"
    assert served.openai.models.retrieve("toy/model").id == "toy/model"
    assert served.chat(model="toy/model").status_code == 200
    assert served.chat(model="toy").status_code == 404


def test_a_model_without_template_says_so(serve):
    """Base models asked to chat."""
    from serving_fakes import FakeEngine, byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    served = serve(engine=FakeEngine(tokenizer=tokenizer))
    error = served.chat().json()["error"]
    assert (error["code"], error["param"]) == ("no_chat_template", "messages")
    assert "/v1/completions" in error["message"]
    assert served.complete().status_code == 200

"""Guidance and probes over HTTP on every engine: alone, in company, streamed, with receipts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving_fakes import FakeEngine
from toy_classifier import toy_classifier

TOWARD = {"classifier": "tone", "target": ["expert"]}
ASKS: list[dict[str, Any]] = [
    {},
    {"guidance": [TOWARD]},
    {"guidance": [TOWARD | {"steps": 3, "decay": 0.9, "avoid": ["casual"]}]},
    {"guidance": [TOWARD | {"target": ["concise", "casual"], "loss": "softmax"}]},
    {"guidance": [TOWARD | {"avoid_rival": True, "loss": "sigmoid", "steps": 2}]},
    {"guidance": [TOWARD | {"normalize": True, "until": 0.9, "steps": 4}]},
    {"guidance": [TOWARD], "vectors": [{"id": "kind", "layers": [0, 1]}]},
    {"guidance": [TOWARD], "ablate": [{"id": "formal"}]},
    {"guidance": [TOWARD], "when": {"probe": "tone/casual", "above": 0.2}},
    {"guidance": [TOWARD | {"apply": {"prompt": False}}]},
    {
        "guidance": [
            {"classifier": "tone", "avoid": ["casual"], "reflect": True, "dose": 1.0}
            | {"over_dose": True}
        ]
    },
]


def body_of(ask: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True, "logprobs": 2}
    return body | ({"steering": ask} if ask else {}) | more


def answer_of(served, ask: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = served.complete(**body_of(ask, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()


def is_fake(served) -> bool:
    return isinstance(served.engine, FakeEngine)


def test_batch_mates_do_not_touch_each_other(served):
    """Goals gathered by the wrong row: one request's labels steer its neighbour."""
    alone = [answer_of(served, ask)["choices"] for ask in ASKS]
    asks = [i for i in range(len(ASKS)) for _ in range(3)]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda i: answer_of(served, ASKS[i])["choices"], asks))
    for i, choices in zip(asks, together, strict=True):
        assert choices[0]["text"] == alone[i][0]["text"], ASKS[i]
        ours, own = (c[0]["logprobs"]["token_logprobs"] for c in (choices, alone[i]))
        assert ours == pytest.approx(own, abs=1e-4)
    if not is_fake(served):
        texts = [repr(choices[0]["logprobs"]["token_logprobs"]) for choices in alone]
        assert len(set(texts)) == len(ASKS)  # every ask does something of its own
        served.until(lambda: served.engine.stats().slots_used == 0)
        if hasattr(served.engine, "bank"):  # vLLM's are in its workers: test_vllm_logits.py
            assert len(served.engine.bank.readers) == 0


def test_scale_0_is_the_unsteered_answer(served):
    """A guided token of size 0 that goes through float32 and back."""
    plain = answer_of(served, {})["choices"][0]
    none = answer_of(served, {"guidance": [TOWARD | {"scale": 0}]})
    assert none["choices"][0] == plain
    assert none["steering"]["applied"][0]["scale"] == 0


def test_the_receipt_says_what_was_done(served):
    """A receipt that repeats the request and not what it came to."""
    (entry,) = answer_of(served, ASKS[2])["steering"]["applied"]
    want = {"kind": "guidance", "id": "tone", "target": ["expert"], "avoid": ["casual"]}
    assert want.items() <= entry.items()
    assert entry["dose"] == {"1": 0.2}
    assert entry["calibrated_dose"] == 0.2
    assert entry["calibrated_for_these_labels"] is False
    assert answer_of(served, ASKS[1])["steering"]["applied"][0]["calibrated_for_these_labels"]


def test_over_the_calibrated_dose_needs_a_flag_that_the_receipt_repeats(served):
    """The cliff: text falls apart a little past the calibrated dose, silently."""
    over = TOWARD | {"scale": 1.5}
    refused = served.complete(**body_of({"guidance": [over]}))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "dose_over_limit"
    assert "over_dose" in refused.json()["error"]["message"]
    allowed = answer_of(served, {"guidance": [over | {"over_dose": True}]})["steering"]
    assert allowed["applied"][0]["over_dose"] is True
    assert allowed["applied"][0]["scale"] == 1.5
    assert allowed["dose"] == {"1": 0.3}


def test_a_layer_that_was_not_calibrated_needs_the_flag(served):
    """A dose found at one layer that is taken for another's."""
    ref = served.app.state.server.info.model
    two = toy_classifier(ref, id="two", layers=(0, 1), seed=4)
    served.store.put_classifier(two.__class__(**{**two.__dict__, "default_layers": (1,)}))
    ask = {"classifier": "two", "target": ["expert"], "layers": [0]}
    refused = served.complete(**body_of({"guidance": [ask]}))
    assert refused.status_code == 400, refused.text
    allowed = {"guidance": [ask | {"dose": 0.1, "over_dose": True}]}
    assert answer_of(served, allowed)["steering"]["applied"][0]["calibrated_dose"] is None


def test_probes_are_read_beside_every_token(served):
    """Readings that are one token late, or miss the first or the last."""
    for ask in ({}, ASKS[1]):
        (choice,) = answer_of(served, ask, probes=["tone"])["choices"]
        tone = choice["probes"]["tone"]
        assert tone["labels"] == ["casual", "expert", "concise"]
        assert tone["layer"] == 1
        assert len(tone["tokens"]) == len(choice["logprobs"]["tokens"]) == 12
        if not is_fake(served):
            assert all(abs(sum(row) - 1) < 1e-3 for row in tone["tokens"])
    assert "probes" not in answer_of(served, {})["choices"][0]


def test_streamed_readings_are_the_whole_ones(served):
    """A stream that drops the readings of tokens without text."""
    whole = served.chat(probes=["tone"], steering=ASKS[1], max_tokens=10).json()["choices"][0]
    rows, text = [], ""
    body = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    body |= {"probes": ["tone"], "steering": ASKS[1], "max_tokens": 10, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    rows += choice.get("probes", {}).get("tone", {}).get("tokens", [])
    assert (text, rows) == (whole["message"]["content"], whole["probes"]["tone"]["tokens"])
    assert rows


def test_a_probe_reads_what_the_model_computed(transformers_served):
    """Readings of the wrong layer or token, against the model run by hand."""
    served = transformers_served
    answer = answer_of(served, {}, probes=["tone"], prompt=[5, 6, 7, 8], return_tokens=None)
    choice = answer["choices"][0]
    tokenizer = served.engine.info.tokenizer
    model = served.engine.loaded.model
    first = [5, 6, 7, 8]
    with torch.inference_mode():
        states = model(torch.tensor([first]), output_hidden_states=True).hidden_states
    # The last layer's output is not among transformers' states before the final norm, so the
    # classifier of the test reads layer 0 as well.
    ref = served.app.state.server.info.model
    served.store.put_classifier(toy_classifier(ref, id="low", layers=(0,), seed=9))
    low = answer_of(served, {}, probes=["low"], prompt=first)["choices"][0]["probes"]["low"]
    weights = served.store.classifier("low").at(0)
    h = states[1][0, -1].float()
    z = (weights.w_in @ h + weights.b_in).relu()
    z = (weights.w_mid @ z + weights.b_mid).relu()
    want = (weights.w_out @ z + weights.b_out).softmax(0)
    assert low["tokens"][0] == pytest.approx(want.tolist(), abs=2e-3)
    assert tokenizer is not None
    assert len(choice["probes"]["tone"]["tokens"]) == 12


def test_metrics_have_the_readings(served):
    """Operators watch drift by the histogram, so it must count each token once."""
    before = served.metric("trimtab_probe_count")
    answer_of(served, {}, probes=["tone"])
    assert served.metric("trimtab_probe_count") - before == 12 * 3


def test_gates_read_classifiers(transformers_served):
    """A gate on a label that reads another label."""
    served = transformers_served
    fired = {}
    for label in ("casual", "expert", "concise"):
        when = {"probe": f"tone/{label}", "above": 0.34}
        ask = {"guidance": [TOWARD | {"scale": 1e-6, "when": when}]}
        (choice,) = answer_of(served, ask, probes=["tone"])["steering"]["choices"]
        fired[label] = choice["gates"][0]["fired"]
    rows = answer_of(served, {}, probes=["tone"])["choices"][0]["probes"]["tone"]["tokens"]
    shares = [sum(row[i] > 0.34 for row in rows) / len(rows) for i in range(3)]
    order = sorted(range(3), key=lambda i: shares[i])
    names = ("casual", "expert", "concise")
    assert fired[names[order[0]]] <= fired[names[order[2]]]
    assert len(set(fired.values())) > 1

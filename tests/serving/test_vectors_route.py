"""Vectors and presets over HTTP: what is stored is whole, ours, and the served model's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from serving_fakes import FakeEngine, model_ref, toy_vector

from trimtab.steering.vector import from_bytes, to_bytes
from trimtab.training.vectors import registry

VECTORS = "/v1/steering/vectors"


def put(served, name: str, data: bytes):
    return served.http.put(f"{VECTORS}/{name}", content=data)


def test_stored_then_loaded_is_the_original(fake_served):
    """A round trip that loses a layer or the calibration."""
    vector = toy_vector("other-name", seed=9)
    answer = put(fake_served, "fresh", to_bytes(vector))
    assert answer.status_code == 201
    card = answer.json()
    assert (card["object"], card["id"]) == ("steering.vector", "fresh")
    assert card["digest"] == vector.digest
    assert "directions" not in card
    assert put(fake_served, "fresh", to_bytes(vector)).status_code == 200
    assert fake_served.http.get(f"{VECTORS}/fresh").json() == card
    content = fake_served.http.get(f"{VECTORS}/fresh/content")
    assert content.headers["content-disposition"] == 'attachment; filename="fresh.safetensors"'
    assert from_bytes(content.content, name="x").digest == vector.digest
    listed = fake_served.http.get(VECTORS).json()
    assert listed["object"] == "list"
    assert "fresh" in [c["id"] for c in listed["data"]]


def test_a_map_comes_with_the_card(fake_served):
    """A page that cannot draw what the command line shows."""
    found = {"layers": [[0], [1]], "scales": [1.0], "dose": 0.1, "effect": [[0.5], [None]],
             "rise": [[0.01], [None]], "n_pairs": 8}  # fmt: skip
    data = to_bytes(replace(toy_vector("mapped", seed=7), calibration={"map": found}))
    assert put(fake_served, "mapped", data).json()["calibration"]["map"] == found
    assert fake_served.http.get(f"{VECTORS}/mapped").json()["calibration"]["map"] == found


def test_a_new_vector_steers_at_once_and_a_deleted_one_is_refused(fake_served):
    """Changes that need a restart, or a cache that outlives its vector."""
    spec = {"vectors": [{"id": "brief"}]}
    assert fake_served.chat(steering=spec).status_code == 404
    put(fake_served, "brief", to_bytes(toy_vector("brief", seed=4)))
    first = fake_served.chat(steering=spec).json()["steering"]["fingerprint"]
    put(fake_served, "brief", to_bytes(toy_vector("brief", seed=5)))
    assert fake_served.chat(steering=spec).json()["steering"]["fingerprint"] != first
    gone = fake_served.http.delete(f"{VECTORS}/brief")
    assert gone.json() == {"id": "brief", "object": "steering.vector", "deleted": True}
    assert fake_served.chat(steering=spec).status_code == 404
    assert fake_served.http.delete(f"{VECTORS}/brief").status_code == 404


def test_gguf_goes_out_and_comes_back(fake_served):
    """llama.cpp's files that lose directions on the way."""
    put(fake_served, "g", to_bytes(toy_vector("g", seed=6)))
    content = fake_served.http.get(f"{VECTORS}/g/content", params={"format": "gguf"})
    assert content.status_code == 200, content.text
    assert content.content[:4] == b"GGUF"
    answer = put(fake_served, "back", content.content)
    assert answer.status_code == 201, answer.text
    assert answer.json()["id"] == "back"
    back = fake_served.store.vector("back")
    original = fake_served.store.vector("g")
    assert back.default_layers == original.default_layers
    for layer in back.layers:
        assert torch.equal(back.row(layer), original.row(layer))


def bad_files() -> dict[str, bytes]:
    good = to_bytes(toy_vector("x"))
    return {
        "empty": b"",
        "text": b"hello there, not a tensor",
        "cut in the tensors": good[:-5],
        "cut in the header": good[:40],
        "header length of 2**63": b"\xff" * 7 + b"\x7f" + good[8:],
        "bits flipped in the header": good[:9] + b"\x00\x00\x00" + good[12:],
        "pickle": b"\x80\x04\x95cos\nsystem\n",
        "gguf cut short": b"GGUF\x03\x00\x00\x00",
        "gguf garbage": b"GGUF" + b"\xff" * 64,
        "wrong width": to_bytes(toy_vector("x", ref=model_ref(hidden_size=16))),
        "another model": to_bytes(toy_vector("x", ref=model_ref(fingerprint="0" * 64))),
        "another family": to_bytes(toy_vector("x", ref=model_ref(model_type="gpt2"))),
        "more layers": to_bytes(
            toy_vector("x", ref=model_ref(n_layers=None, fingerprint=None), layers=(0, 7))
        ),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_bad_files_are_refused_and_nothing_is_stored(fake_served, kind):
    """A half-written or foreign vector that steers with noise, or breaks the next start."""
    answer = put(fake_served, "bad", bad_files()[kind])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "body"
    assert answer.json()["error"]["code"] in ("invalid_artifact", "invalid_steering")
    assert fake_served.http.get(f"{VECTORS}/bad").status_code == 404
    assert fake_served.http.get(VECTORS).json()["problems"] == {}


NAMES = ["..", "%2e%2e", "%2e%2e%2fx", "..%2f..%2fetc%2fpasswd", "a%00b", ".hidden", "a" * 5000,
         "a%2fb", "a..b", "%ff", "a b", "a%0ab", "-x", "~", "a\\b"]  # fmt: skip


@pytest.mark.parametrize("kind", ["vectors", "classifiers", "presets"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_path_tricks_are_refused(fake_served, name, method, kind):
    """An id that leaves the store's folder reads or writes anybody's files."""
    before = sorted(fake_served.store.folder.parent.rglob("*"))
    answer = fake_served.http.request(
        method, f"/v1/steering/{kind}/{name}", content=to_bytes(toy_vector("x"))
    )
    assert answer.status_code in (400, 404, 405), answer.text
    assert answer.json()["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert sorted(fake_served.store.folder.parent.rglob("*")) == before


def test_a_vector_deleted_while_in_use_finishes_its_answer(serve):
    """Running requests keep their plan; the next one is refused."""
    served = serve(engine=FakeEngine(delay_s=0.02))
    answers = []
    spec = {"vectors": [{"id": "kind"}]}
    runs = threading.Thread(target=lambda: answers.append(served.chat(steering=spec)))
    runs.start()
    served.until(lambda: bool(served.engine.live))
    assert served.http.delete(f"{VECTORS}/kind").status_code == 200
    runs.join()
    assert answers[0].json()["steering"]["applied"][0]["id"] == "kind"
    assert answers[0].json()["steering"]["choices"][0]["steered_tokens"] > 0
    assert served.chat(steering=spec).status_code == 404


def test_downloads_take_known_formats_only(fake_served):
    """A misspelt format that falls back to another file type."""
    for params in ({"format": "pt"}, {"fromat": "gguf"}):
        answer = fake_served.http.get(f"{VECTORS}/kind/content", params=params)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in ("format", "fromat")
    assert fake_served.http.get(f"{VECTORS}/nope/content").status_code == 404


PRESETS = "/v1/steering/presets"


def test_presets_are_checked_saved_listed_and_deleted(fake_served):
    """A preset that only fails when somebody uses it."""
    made = fake_served.http.put(f"{PRESETS}/calm", json="0.5 kind")
    assert made.status_code == 201
    assert made.json()["model"] == "toy:calm"
    assert made.json()["check"]["layers"] == [1]
    assert fake_served.http.put(f"{PRESETS}/calm", json={"vectors": [{"id": "kind"}]}).is_success
    models = fake_served.http.get("/v1/models").json()["data"]
    assert "toy:calm" in [m["id"] for m in models]
    assert fake_served.http.get("/v1/models/toy:calm").json()["id"] == "toy:calm"
    assert fake_served.http.get("/v1/models/toy").status_code == 200
    assert fake_served.http.get(f"{PRESETS}/calm").json()["spec"] == {"vectors": [{"id": "kind"}]}
    assert "calm" in [p["id"] for p in fake_served.http.get(PRESETS).json()["data"]]
    assert fake_served.http.delete(f"{PRESETS}/calm").json()["deleted"] is True
    assert fake_served.http.get(f"{PRESETS}/calm").status_code == 404
    assert fake_served.http.get("/v1/models/toy:calm").status_code == 404
    assert fake_served.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("spec", "param"),
    [({"vectors": [{"id": "nope"}]}, "preset.vectors[0].id"), ({}, "preset"),
     ("1.0 huge", "preset.vectors[0].scale"), ({"vectrs": []}, "preset.vectrs")],
    ids=range(4),
)  # fmt: skip
def test_presets_that_cannot_run_are_not_saved(fake_served, spec, param):
    """Saved broken presets show up as models that always fail."""
    answer = fake_served.http.put(f"{PRESETS}/bad", json=spec)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert fake_served.http.get(f"{PRESETS}/bad").status_code == 404


def test_check_reports_what_a_request_would_apply(fake_served):
    """A dry run that differs from the real one."""
    seen = len(fake_served.engine.seen)
    report = fake_served.http.post("/v1/steering/check", json={"steering": "0.5 kind"}).json()
    assert len(fake_served.engine.seen) == seen
    receipt = fake_served.chat(steering="0.5 kind").json()["steering"]
    for name in ("fingerprint", "applied", "layers", "dose"):
        assert report[name] == receipt[name]


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "steering"), ({"steering": "1 nope"}, "steering.vectors[0].id"),
     ({"stering": 1}, "stering"), ({"model": 7}, "model"),
     ({"steering": "1 kind", "model": "other"}, "model"),
     ({"steering": "9 huge"}, "steering.vectors[0].scale")],
    ids=range(6),
)  # fmt: skip
def test_check_refuses_what_a_request_would(fake_served, body, param):
    """A dry run that says yes to what is then refused."""
    answer = fake_served.http.post("/v1/steering/check", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_methods_come_from_the_registry(fake_served):
    """A list kept by hand that falls behind the code."""
    data = fake_served.http.get("/v1/steering/methods").json()["data"]
    assert {m["id"] for m in data} == set(registry.METHODS)
    assert [m["id"] for m in data if m["is_default"]] == [registry.DEFAULT]
    assert all(m["summary"] and m["source"] for m in data)
    assert {a for m in data for a in m["aliases"]} == set(registry.ALIASES)

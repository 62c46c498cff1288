"""Steering over HTTP on every engine: alone, in company, gated, and stored on the way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import torch
from serving_fakes import toy_vector

from trimtab.steering.vector import from_bytes, to_bytes

ASKS = [
    {},
    {"steering": "1.0 kind"},
    {"steering": "-1.0 kind"},
    {"steering": "0.5 kind - 0.5 formal"},
    {"steering": {"ablate": [{"id": "formal"}]}},
    {"steering": {"vectors": [{"id": "kind", "apply": {"prompt": False}}]}},
    {"steering": {"vectors": [{"id": "kind", "apply": {"generation": False}}]}},
    {"steering": {"vectors": [{"id": "kind", "layers": [0, 1], "normalize": True}]}},
]


def body_of(ask: dict, **more) -> dict:
    body = {"model": "toy", "prompt": "Once upon", "max_tokens": 16, "temperature": 0}
    return body | {"ignore_eos": True} | ask | more


def without_identity(answer: httpx.Response) -> dict:
    body = answer.json()
    assert answer.status_code == 200, body
    body["usage"].pop("prompt_tokens_details")
    return {k: v for k, v in body.items() if k not in ("id", "created")}


def test_batch_mates_do_not_touch_each_other(served):
    """Steering that leaks from one request of a batch into the next."""
    alone = [without_identity(served.complete(**body_of(ask))) for ask in ASKS]
    with ThreadPoolExecutor(len(ASKS) * 3) as pool:
        asks = [ask for ask in ASKS for _ in range(3)]
        together = list(pool.map(lambda ask: served.complete(**body_of(ask)), asks))
    for i, answer in enumerate(together):
        assert without_identity(answer) == alone[i // 3], asks[i]


def test_steered_tokens_follow_the_window(served):
    """A receipt that counts tokens which `apply` leaves out, or the other way round."""
    counts = []
    for ask in (ASKS[1], ASKS[5], ASKS[6]):
        answer = served.complete(**body_of(ask)).json()
        (choice,) = answer["steering"]["choices"]
        counts.append(choice["steered_tokens"])
    if type(served.engine).__name__ == "FakeEngine":
        return  # counts as if every token were steered
    everywhere, generation, prompt = counts
    assert everywhere == generation + prompt
    assert prompt == answer["usage"]["prompt_tokens"]


def test_gates_are_accounted_for(served):
    """A gate that never opens looks like steering that does nothing; the receipt tells."""
    ref = served.app.state.server.info.model
    vector = toy_vector("gate", ref=ref, size=served.store.vector("kind").row(1).norm(), seed=8)
    always = replace(vector, probe=torch.tensor([[0.0, 9.0]] * 2), probe_layer=0)
    served.store.put_vector(always)
    prints = {}
    for side in ("above", "below"):
        when = {"probe": "gate", side: 0.5, "layer": 0}
        spec = {"vectors": [{"id": "kind", "layers": [1]}], "when": when}
        answer = served.complete(**body_of({"steering": spec})).json()
        prints[side] = answer["choices"][0]["text"], answer["steering"]["choices"][0]
    if type(served.engine).__name__ == "FakeEngine":
        return  # has no hidden states to read
    plain = served.complete(**body_of({})).json()["choices"][0]["text"]
    open_text, open_receipt = prints["above"]
    shut_text, shut_receipt = prints["below"]
    assert (open_text != plain, shut_text == plain) == (True, True)
    assert open_receipt["gates"][0]["probe"] == "gate"
    assert open_receipt["gates"][0]["fired"]
    assert not shut_receipt["gates"][0]["fired"]


def test_upload_steer_download_delete(served):
    """The whole way of a vector over HTTP, on the engine that serves it."""
    ref = served.app.state.server.info.model
    size = float(served.store.vector("kind").row(1).norm())
    data = to_bytes(toy_vector("fresh", ref=ref, size=size, seed=11))
    path = "/v1/steering/vectors/fresh"
    assert served.http.put(path, content=data).status_code == 201
    assert served.complete(**body_of({"steering": "1 fresh"})).status_code == 200
    content = served.http.get(f"{path}/content").content
    assert from_bytes(content, name="x").digest == from_bytes(data, name="x").digest
    assert served.http.delete(path).status_code == 200
    assert served.complete(**body_of({"steering": "1 fresh"})).status_code == 404


def test_a_stream_left_early_frees_its_place(served):
    """Abandoned streams that keep their batch rows and steering slots."""
    body = body_of(ASKS[1], max_tokens=200, n=4, stream=True)
    with (
        httpx.Client(base_url=served.url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        next(answer.iter_bytes())
    served.until(lambda: served.engine.stats().running == 0)
    served.until(lambda: served.engine.stats().slots_used == 0)


def test_too_long_prompts_are_refused_by_name(served):
    """A prompt over the context that is cut silently."""
    room = served.app.state.server.info.max_context
    answer = served.complete(prompt=[5] * (room + 1))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] in ("prompt", "max_tokens")
    over = served.complete(max_tokens=room)
    assert over.status_code == 400
    assert over.json()["error"]["code"] == "context_length_exceeded"

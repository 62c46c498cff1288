"""Similarities over HTTP: of what is stored now, named or all, and refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serving_fakes import LAYERS, FakeEngine, toy_vector

from trimtab.steering.similarity import MAX_VECTORS, similarities

URL = "/v1/steering/similarities"


@pytest.fixture
def served(serve):
    """A server whose store no other test fills."""
    return serve()


def test_all_stored_vectors_are_compared(served):
    """Catches rows and ids in different orders, or a vector that is stored and left out."""
    kind = served.store.vector("kind")
    served.store.put_vector(replace(kind, id="cruel", directions=-kind.directions))
    body = served.http.get(URL).json()
    assert (body["object"], body["layer"]) == ("steering.similarities", None)
    assert body["ids"] == ["cruel", "formal", "huge", "kind"]
    assert body["matrix"] == similarities(served.store.vectors())
    assert body["matrix"][0][3] == -1
    served.store.delete_vector("cruel")
    assert served.http.get(URL).json()["ids"] == ["formal", "huge", "kind"]


def test_ids_and_layer_choose(served):
    """Catches an order of the store's own, or a layer that is read and not used."""
    some = [served.store.vector(name) for name in ("kind", "formal")]
    matrices = []
    for layer in range(LAYERS):
        body = served.http.get(URL, params={"ids": "kind,formal", "layer": layer}).json()
        assert (body["ids"], body["layer"]) == (["kind", "formal"], layer)
        assert body["matrix"] == similarities(some, layer=layer)
        matrices.append(body["matrix"])
    assert matrices[0] != matrices[1]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [("ids=kind,nope", 404, "ids"), ("ids=", 400, "ids"), ("ids=kind,", 400, "ids"),
     ("ids=../kind", 400, "ids"), ("ids=kind,kind", 400, "ids"),
     ("ids=kind&ids=formal", 400, "ids"),
     ("ids=" + "kind," * MAX_VECTORS + "kind", 400, "ids"), ("layer=one", 400, "layer"),
     ("layer=-1", 400, "layer"), ("layer=", 400, "layer"), ("layer=1.0", 400, "layer"),
     ("layer=%D9%A1", 400, "layer"), (f"layer={LAYERS}", 400, "layer"),
     ("layer=" + "9" * 5000, 400, "layer"), ("layr=1", 400, "layr")],
    ids=range(15),
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(served, query, status, param):
    """Catches a misspelt parameter that answers another question, or a 500 for bad input."""
    answer = served.http.get(f"{URL}?{query}")
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert len(answer.json()["error"]["message"]) < 400


def test_more_than_can_be_compared_asks_for_names(served):
    """Catches an answer that grows with the square of the store."""
    for i in range(MAX_VECTORS):
        served.store.put_vector(toy_vector(f"v{i}", seed=i))
    answer = served.http.get(URL)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "ids"
    assert "ids=a,b,c" in answer.json()["error"]["message"]
    assert served.http.get(URL, params={"ids": "v1,v2"}).is_success


def test_a_model_that_is_still_loading_needs_no_waiting(serve):
    """Catches a comparison of files that waits for a model it does not need."""
    engine = FakeEngine()
    engine.may_start.clear()
    served = serve(engine=engine, wait=False)
    assert served.http.get(URL).json()["ids"] == ["formal", "huge", "kind"]
    assert served.http.get("/health").json() == {"status": "loading"}
    engine.may_start.set()

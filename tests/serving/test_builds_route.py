"""/v1/steering/builds: what it refuses and how, who may ask, what it says on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from build_wire import CLASSIFIER, PAIRS, PATH, TEXTS, VECTOR, Held, built, ended, post, started
from build_wire import state as state_of
from running_server import Served
from serving_fakes import toy_vector

ADMIN = "an-admin-key"
USER = "a-user-key"


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def with_pair(**fields: Any) -> dict[str, Any]:
    return VECTOR | {"pairs": [*PAIRS[:3], PAIRS[3] | fields, *PAIRS[4:]]}


def with_text(**fields: Any) -> dict[str, Any]:
    row = {k: v for k, v in (TEXTS[3] | fields).items() if v is not None}
    return CLASSIFIER | {"texts": [*TEXTS[:3], row, *TEXTS[4:]]}


def from_words(**fields: Any) -> dict[str, Any]:
    return without(VECTOR, "pairs") | fields


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (without(VECTOR, "kind"), "kind"),
        (VECTOR | {"kind": "preset"}, "kind"),
        (VECTOR | {"kind": ["vector"]}, "kind"),
        (without(VECTOR, "id"), "id"),
        (VECTOR | {"id": "../up"}, "id"),
        (VECTOR | {"colour": 1}, "colour"),
        (VECTOR | {"texts": TEXTS}, "texts"),
        (CLASSIFIER | {"pairs": PAIRS}, "pairs"),
        (CLASSIFIER | {"method": "pca"}, "method"),
        (from_words(), "concept"),
        (VECTOR | {"concept": "warm"}, "pairs"),
        (from_words(concept="warmm"), "concept"),
        (from_words(concept=""), "concept"),
        (from_words(describe="warm"), "against"),
        (VECTOR | {"against": "cold"}, "against"),
        (from_words(describe="warm", against=" "), "against"),
        (from_words(describe="warm", against="warm "), "against"),
        (from_words(describe="w" * 201, against="cold"), "describe"),
        (VECTOR | {"method": "magic"}, "method"),
        (VECTOR | {"method": "pca", "params": {"colour": 1}}, "params.colour"),
        (VECTOR | {"method": "pca", "params": {"pairing": "odd"}}, "params.pairing"),
        (VECTOR | {"method": "pca", "params": {"pairing": []}}, "params.pairing"),
        (VECTOR | {"method": "pca", "params": {"pairing": "x" * 201}}, "params.pairing"),
        (VECTOR | {"method": "logistic", "params": {"c": -1}}, "params.c"),
        (VECTOR | {"method": "grains", "params": {"attribution": "magic"}}, "params.attribution"),
        (VECTOR | {"method": "grains", "params": {"k": 0}}, "params.k"),
        (VECTOR | {"method": "grains", "pairs": [{"positive": "a", "negative": "b"}]}, "pairs"),
        (VECTOR | {"position": "middle"}, "position"),
        (VECTOR | {"position": 99}, "position"),
        (VECTOR | {"position": True}, "position"),
        (VECTOR | {"position": 1.0}, "position"),
        (VECTOR | {"normalize": 1}, "normalize"),
        (VECTOR | {"map": True}, "map"),
        (VECTOR | {"description": "d" * 1001}, "description"),
        (VECTOR | {"overwrite": "yes"}, "overwrite"),
        (VECTOR | {"pairs": {}}, "pairs"),
        (VECTOR | {"pairs": []}, "pairs"),
        (VECTOR | {"pairs": PAIRS[:3]}, "pairs"),
        (VECTOR | {"pairs": [*PAIRS, 3]}, "pairs[16]"),
        (with_pair(prompt=None), "pairs[3].prompt"),
        (with_pair(preferred=" "), "pairs[3].preferred"),
        (with_pair(dispreferred=7), "pairs[3].dispreferred"),
        (with_pair(dispreferred=PAIRS[3]["preferred"]), "pairs[3].dispreferred"),
        (with_pair(dispreferred="d" * 20_001), "pairs[3].dispreferred"),
        (with_pair(dispreferred="d" * 600), "pairs[3]"),
        (with_pair(colour="red"), "pairs[3].colour"),
        (with_pair(split="test"), "pairs[3].split"),
        (with_pair(split="held"), "pairs"),
        (VECTOR | {"pairs": [*PAIRS, {"positive": "a"}]}, "pairs[16].negative"),
        (VECTOR | {"pairs": [*PAIRS, {"positive": "a", "prompt": "p"}]}, "pairs[16].prompt"),
        (without(CLASSIFIER, "texts"), "bundled"),
        (CLASSIFIER | {"bundled": "tone"}, "texts"),
        (without(CLASSIFIER, "texts") | {"bundled": "tones"}, "bundled"),
        (CLASSIFIER | {"own_answer_tokens": 4}, "own_answer_tokens"),
        (
            without(CLASSIFIER, "texts") | {"bundled": "tone", "own_answer_tokens": 512},
            "own_answer_tokens",
        ),
        (without(CLASSIFIER, "texts") | {"bundled": "tone", "position": "answer"}, "position"),
        (CLASSIFIER | {"network": "deep"}, "network"),
        (CLASSIFIER | {"hidden": 0}, "hidden"),
        (CLASSIFIER | {"hidden": 1025}, "hidden"),
        (CLASSIFIER | {"layers": []}, "layers"),
        (CLASSIFIER | {"layers": [0, "1"]}, "layers[1]"),
        (CLASSIFIER | {"layers": [2]}, "layers"),
        (CLASSIFIER | {"position": "mean"}, "position"),
        (CLASSIFIER | {"seed": 2**63}, "seed"),
        (CLASSIFIER | {"texts": TEXTS[:2]}, "texts"),
        (CLASSIFIER | {"texts": [row | {"label": "one"} for row in TEXTS]}, "texts"),
        (CLASSIFIER | {"texts": ["text"]}, "texts[0]"),
        (with_text(text=None), "texts[3].text"),
        (with_text(text=""), "texts[3].text"),
        (with_text(prompt=3), "texts[3].prompt"),
        (with_text(text="t" * 600), "texts[3]"),
        (with_text(label=None), "texts[3].label"),
        (with_text(label="."), "texts[3].label"),
        (with_text(labels=["a", "b"]), "texts[3].label"),
        (with_text(label=None, labels="a"), "texts[3].labels"),
        (with_text(label=None, labels=["a", "b"]), "texts"),
        (with_text(colour="red"), "texts[3].colour"),
        (with_text(split=1), "texts[3].split"),
    ],
)
def test_a_bad_build_is_refused_before_it_starts(
    transformers_served: Served, body: dict[str, Any], param: str
) -> None:
    """Catches a build that fails minutes later on what could be seen at once, and lost paths."""
    answer = post(transformers_served, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert len(error["message"]) < 600
    assert len(transformers_served.app.state.server.builds) == 0


def test_data_is_bounded(serve_toy: Callable[..., Served]) -> None:
    """Catches a build of any size: rows and characters are the operator's to bound."""
    served = serve_toy(build_max_rows=16, build_max_chars=1000)
    many = post(served, VECTOR, pairs=[*PAIRS, PAIRS[0]])
    assert (many.status_code, many.json()["error"]["param"]) == (413, "pairs")
    long = post(served, VECTOR, pairs=[PAIRS[0] | {"preferred": "a" * 1000}, *PAIRS[1:]])
    assert (long.status_code, long.json()["error"]["code"]) == (413, "build_too_large")
    assert post(served, VECTOR).status_code == 202


def test_only_admins_start_and_cancel(serve_toy: Callable[..., Served]) -> None:
    """Catches a user's key that may write to the store, or a stranger who may watch."""
    served = serve_toy(api_keys=(USER,), admin_keys=(ADMIN,))
    user, admin = ({"authorization": f"Bearer {key}"} for key in (USER, ADMIN))
    http = served.http
    assert http.post(PATH, json=VECTOR).status_code == 401
    refused = http.post(PATH, json=VECTOR, headers=user)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
    with Held("reading hidden states") as held:
        id = http.post(PATH, json=VECTOR, headers=admin).json()["id"]
        held.reached()
        for path in (PATH, f"{PATH}/{id}"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers=user).status_code == 200
        assert http.delete(f"{PATH}/{id}", headers=user).status_code == 403
        assert http.delete(f"{PATH}/{id}", headers=admin).status_code == 200
    served.until(lambda: http.get(f"{PATH}/{id}", headers=user).json()["status"] == "cancelled")


def test_an_engine_without_the_model_says_what_to_do(fake_served: Served) -> None:
    """Catches a build that is taken by an engine which cannot run it."""
    for answer in (post(fake_served, VECTOR), fake_served.http.get(PATH)):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (501, "builds_unavailable")
        assert "trimtab vectors build" in error["message"]
        assert "--engine transformers" in error["message"]
    assert fake_served.http.get(f"{PATH}/build-1").status_code == 404


def test_an_id_is_taken_unless_it_may_be_replaced(serve_toy: Callable[..., Served]) -> None:
    """Catches a vector that is lost to a build nobody meant to replace it."""
    served = serve_toy()
    first = built(served, VECTOR)
    taken = post(served, VECTOR)
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "already_exists")
    assert taken.json()["error"]["param"] == "id"
    second = built(served, VECTOR, overwrite=True, method="pca")
    assert (first["method"], second["method"]) == ("mean_difference", "pca")
    assert served.http.get("/v1/steering/vectors/made").json() == second
    # Names are unique within a kind.
    assert built(served, CLASSIFIER)["object"] == "steering.classifier"
    with Held("reading hidden states") as held:
        started(served, VECTOR, id="other")
        held.reached()
        twice = post(served, VECTOR, id="other")
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "already_exists")


def test_what_comes_meanwhile_is_not_replaced(serve_toy: Callable[..., Served]) -> None:
    """Catches a build that overwrites a vector uploaded while it ran."""
    served = serve_toy()
    with Held("reading hidden states") as held:
        id = started(served, VECTOR)
        held.reached()
        mine = toy_vector("made", ref=served.engine.info.model)
        served.store.put_vector(mine)
    last = ended(served, id)
    assert (last["status"], last["error"]["code"]) == ("failed", "already_exists")
    assert served.store.vector("made").digest == mine.digest


def test_a_full_queue_says_when_to_come_back(serve_toy: Callable[..., Served]) -> None:
    """Catches a queue without bounds, a wrong place in it, or a cancelled job that keeps one."""
    served = serve_toy(build_max_queue=2)
    with Held("reading hidden states") as held:
        running = started(served, VECTOR)
        held.reached()
        waiting = started(served, VECTOR, id="next")
        assert state_of(served, running)["position"] == 0
        now = state_of(served, waiting)
        assert (now["status"], now["position"], now["stage"]) == ("queued", 1, None)
        refused = post(served, VECTOR, id="third")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert served.metric("trimtab_builds_live") == 2
        served.http.delete(f"{PATH}/{waiting}")
        served.until(lambda: state_of(served, waiting)["status"] == "cancelled")
        third = started(served, VECTOR, id="third")
    assert ended(served, running)["status"] == ended(served, third)["status"] == "done"
    assert not served.store.has_vector("next")
    assert served.metric('trimtab_builds_ended_total{kind="vector",status="done"}') == 2
    assert served.metric('trimtab_builds_ended_total{kind="vector",status="cancelled"}') == 1


def test_ended_builds_are_listed_bounded_and_forgotten(serve_toy: Callable[..., Served]) -> None:
    """Catches a list that grows for ever, loses the newest, or never lets one go."""
    served = serve_toy()
    ids = []
    for i in range(34):
        ids.append(started(served, VECTOR, id=f"v{i}"))
        ended(served, ids[-1])
    listed = [one["id"] for one in served.http.get(PATH).json()["data"]]
    assert listed == ids[:1:-1]
    assert served.http.get(f"{PATH}/{ids[0]}").status_code == 404
    gone = served.http.delete(f"{PATH}/{ids[-1]}").json()
    assert gone == {"id": ids[-1], "object": "steering.build", "deleted": True}
    assert served.http.get(f"{PATH}/{ids[-1]}").status_code == 404
    assert served.store.has_vector("v33")


def test_docs_show_both_bodies(transformers_served: Served) -> None:
    """Catches request models that /docs does not know."""
    document = transformers_served.http.get("/openapi.json").json()
    content = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]
    for one in content["schema"]["oneOf"]:
        assert one["$ref"].rpartition("/")[2] in document["components"]["schemas"]
    for example in content["examples"].values():
        assert example["value"]["kind"] in ("vector", "classifier")

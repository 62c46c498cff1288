"""Classifiers over HTTP: what is stored is whole, ours, and the served model's."""

from __future__ import annotations

import threading

import pytest
from serving_fakes import model_ref, toy_vector
from toy_classifier import toy_classifier

from trimtab.steering import vector as vector_file
from trimtab.steering.classifier import from_bytes, to_bytes

CLASSIFIERS = "/v1/steering/classifiers"
API, ADMIN = "api-key-of-a-user", "admin-key-of-the-owner"


def put(served, name: str, data: bytes):
    return served.http.put(f"{CLASSIFIERS}/{name}", content=data)


@pytest.mark.parametrize("hidden", [0, 8], ids=["linear", "deep"])
@pytest.mark.parametrize("is_exclusive", [True, False], ids=["softmax", "sigmoid"])
def test_stored_then_loaded_is_the_original(fake_served, hidden, is_exclusive):
    """A round trip that loses a layer, a label or the calibrated doses."""
    sent = toy_classifier(model_ref(), layers=(0, 1), hidden=hidden, is_exclusive=is_exclusive)
    name = f"fresh-{hidden}-{is_exclusive}"
    answer = put(fake_served, name, to_bytes(sent))
    assert answer.status_code == 201, answer.text
    card = answer.json()
    assert (card["object"], card["id"]) == ("steering.classifier", name)
    assert card["digest"] == sent.digest
    assert card["labels"] == ["casual", "expert", "concise"]
    assert card["doses"][0]["target"] == ["casual"]
    assert "w_in" not in card
    assert put(fake_served, name, to_bytes(sent)).status_code == 200
    assert fake_served.http.get(f"{CLASSIFIERS}/{name}").json() == card
    content = fake_served.http.get(f"{CLASSIFIERS}/{name}/content")
    assert content.headers["content-disposition"] == f'attachment; filename="{name}.safetensors"'
    assert content.headers["etag"] == f'"{sent.digest}"'
    assert from_bytes(content.content, name="x").digest == sent.digest
    assert content.content == to_bytes(sent.renamed(name))
    listed = fake_served.http.get(CLASSIFIERS).json()
    assert listed["object"] == "list"
    assert card in listed["data"]


def test_a_deleted_classifier_is_gone(fake_served):
    """A cache that outlives its file, or a second deletion that claims success."""
    put(fake_served, "brief", to_bytes(toy_classifier(model_ref())))
    gone = fake_served.http.delete(f"{CLASSIFIERS}/brief")
    assert gone.json() == {"id": "brief", "object": "steering.classifier", "deleted": True}
    for answer in (
        fake_served.http.get(f"{CLASSIFIERS}/brief"),
        fake_served.http.get(f"{CLASSIFIERS}/brief/content"),
        fake_served.http.delete(f"{CLASSIFIERS}/brief"),
    ):
        assert answer.status_code == 404
        assert "Unknown classifier 'brief'" in answer.json()["error"]["message"]
    assert fake_served.http.get(f"{CLASSIFIERS}/brief").json()["error"]["param"] == "id"


def test_a_vector_and_a_classifier_may_share_an_id(fake_served):
    """One name space for two routes: a PUT to one that replaces the other."""
    assert put(fake_served, "kind", to_bytes(toy_classifier(model_ref()))).status_code == 201
    assert fake_served.http.get("/v1/steering/vectors/kind").json()["object"] == "steering.vector"
    assert fake_served.http.delete(f"{CLASSIFIERS}/kind").status_code == 200
    assert fake_served.http.get("/v1/steering/vectors/kind").status_code == 200


def bad_files() -> dict[str, bytes]:
    good = to_bytes(toy_classifier(model_ref()))
    return {
        "empty": b"",
        "text": b"hello there, not a tensor",
        "cut in the tensors": good[:-5],
        "cut in the header": good[:40],
        "header length of 2**63": b"\xff" * 7 + b"\x7f" + good[8:],
        "bits flipped in the header": good[:9] + b"\x00\x00\x00" + good[12:],
        "pickle": b"\x80\x04\x95cos\nsystem\n",
        "gguf": b"GGUF\x03\x00\x00\x00" + b"\x00" * 64,
        "a vector": vector_file.to_bytes(toy_vector("x")),
        "wrong width": to_bytes(toy_classifier(model_ref(hidden_size=16))),
        "another model": to_bytes(toy_classifier(model_ref(fingerprint="0" * 64))),
        "another family": to_bytes(toy_classifier(model_ref(model_type="gpt2"))),
        "more layers": to_bytes(
            toy_classifier(model_ref(n_layers=None, fingerprint=None), layers=(0, 7))
        ),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_bad_files_are_refused_and_nothing_is_stored(fake_served, kind):
    """A half-written or foreign classifier that guides with noise, or breaks the next start."""
    answer = put(fake_served, "bad", bad_files()[kind])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "body"
    assert answer.json()["error"]["code"] in ("invalid_artifact", "invalid_steering")
    assert "Vector 'bad'" not in answer.text
    assert fake_served.http.get(f"{CLASSIFIERS}/bad").status_code == 404
    assert fake_served.http.get(CLASSIFIERS).json()["problems"] == {}


def test_a_foreign_classifier_is_called_one(fake_served):
    """A message that speaks of a vector when a classifier was sent."""
    answer = put(fake_served, "bad", bad_files()["another model"])
    message = answer.json()["error"]["message"]
    assert message.startswith("Classifier 'bad' was built for another model")


def test_a_file_too_large_is_refused(serve):
    """An upload that fills the memory before anybody looks at its length."""
    served = serve(max_upload_bytes=1024)
    answer = put(served, "big", to_bytes(toy_classifier(model_ref())))
    assert answer.status_code == 413
    assert served.http.get(f"{CLASSIFIERS}/big").status_code == 404


def test_changes_need_the_admin_key(serve):
    """A user's key that deletes everybody's classifiers."""
    served = serve(api_keys=(API,), admin_keys=(ADMIN,))
    data = to_bytes(toy_classifier(model_ref()))
    user, admin = ({"authorization": f"Bearer {key}"} for key in (API, ADMIN))

    def ask(method: str, headers: dict[str, str]) -> int:
        answer = served.http.request(method, f"{CLASSIFIERS}/new", content=data, headers=headers)
        return answer.status_code

    assert ask("PUT", {}) == 401
    assert ask("PUT", user) == 403
    assert ask("PUT", admin) == 201
    assert ask("DELETE", user) == 403
    assert ask("GET", user) == 200
    assert ask("DELETE", admin) == 200


def test_a_classifier_is_always_listed_while_it_is_replaced(fake_served):
    """A list that misses a classifier, or shows half of two, in the moment of its replacement."""
    files = [to_bytes(toy_classifier(model_ref(), seed=seed)) for seed in (1, 2)]
    digests = {from_bytes(data, name="x").digest for data in files}
    put(fake_served, "busy", files[0])
    statuses = []

    def replace() -> None:
        statuses.extend(put(fake_served, "busy", data).status_code for data in files * 8)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = []
    while writer.is_alive() or not seen:
        listed = fake_served.http.get(CLASSIFIERS).json()
        assert listed["problems"] == {}
        seen.append([c["digest"] for c in listed["data"] if c["id"] == "busy"])
    writer.join()
    assert set(statuses) == {200}
    assert all(len(found) == 1 and found[0] in digests for found in seen)


def test_a_damaged_file_is_named_where_it_belongs(serve):
    """A classifier that cannot be read and is listed nowhere, or among the vectors."""
    served = serve()
    folder = served.store.folder / "classifiers"
    folder.mkdir(exist_ok=True)
    (folder / "torn.safetensors").write_bytes(b"torn")
    assert list(served.http.get(CLASSIFIERS).json()["problems"]) == ["torn.safetensors"]
    assert served.http.get("/v1/steering/vectors").json()["problems"] == {}
    answer = served.http.get(f"{CLASSIFIERS}/torn")
    assert answer.status_code == 404
    assert "cannot be read" in answer.json()["error"]["message"]


def test_downloads_take_known_formats_only(fake_served):
    """A misspelt format, or one that classifiers do not have, that falls back to another."""
    put(fake_served, "tone", to_bytes(toy_classifier(model_ref())))
    for params in ({"format": "gguf"}, {"fromat": "safetensors"}):
        answer = fake_served.http.get(f"{CLASSIFIERS}/tone/content", params=params)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(params))
    whole = fake_served.http.get(f"{CLASSIFIERS}/tone/content", params={"format": "safetensors"})
    assert whole.status_code == 200


def test_the_openapi_document_has_the_routes(fake_served):
    """Routes that work and that /docs does not show."""
    paths = fake_served.http.get("/openapi.json").json()["paths"]
    assert set(paths[CLASSIFIERS]) == {"get"}
    assert set(paths[f"{CLASSIFIERS}/{{name}}"]) == {"get", "put", "delete"}
    body = paths[f"{CLASSIFIERS}/{{name}}"]["put"]["requestBody"]
    assert list(body["content"]) == ["application/octet-stream"]

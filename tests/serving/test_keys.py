"""Who may use the server, and who may change it."""

from __future__ import annotations

import openai
import pytest
from serving_fakes import toy_vector

from trimtab.serving.keys import is_known
from trimtab.steering.vector import to_bytes

API, ADMIN = "api-key-of-a-user", "admin-key-of-the-owner"
OPEN = {"/health", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def guarded(serve):
    return serve(api_keys=(API,), admin_keys=(ADMIN,))


def test_every_route_but_the_open_ones_needs_a_key(guarded):
    """A route added later that nobody thought to guard."""
    paths = guarded.http.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    for path, methods in paths.items():
        for method in methods:
            answer = guarded.http.request(method, path.replace("{name}", "kind"))
            assert (answer.status_code == 401) == (path not in OPEN), (method, path)
    assert guarded.http.get("/v1/not/there").status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer  x", f"Basic {API}", "Bearer wrong-key-altogether", f"Bearer {API}x",
     f"Bearer {API[:-1]}", f"Bearer {API.upper()}", API],
)  # fmt: skip
def test_wrong_keys_are_refused(guarded, header):
    """A prefix, another case or another scheme that is let in."""
    answer = guarded.http.get("/v1/models", headers={"authorization": header})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert API not in answer.text


def test_keys_let_in(guarded):
    """The scheme is case-insensitive, and an admin may also use the API."""
    for header in (f"Bearer {API}", f"bearer {API}", f"Bearer {ADMIN}"):
        headers = {"authorization": header}
        assert guarded.http.get("/v1/models", headers=headers).status_code == 200
        assert guarded.http.get("/metrics", headers=headers).status_code == 200


def test_openais_client_meets_its_own_error(guarded):
    """Clients retry or report by the error's class."""
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong-key", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


CHANGES = [
    ("PUT", "/v1/steering/vectors/new"),
    ("DELETE", "/v1/steering/vectors/kind"),
    ("PUT", "/v1/steering/classifiers/new"),
    ("DELETE", "/v1/steering/classifiers/kind"),
    ("PUT", "/v1/steering/presets/new"),
    ("DELETE", "/v1/steering/presets/new"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_changes_need_the_admin_key(guarded, method, path):
    """A user's key that deletes everybody's vectors."""
    answer = guarded.http.request(method, path, headers=bearer(API), content=b"{}")
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "admin_key_required"
    assert guarded.store.vector("kind")


def test_without_an_admin_key_changes_are_refused_with_the_way_out(serve):
    """With api keys only, nobody may change anything, and the operator must learn how."""
    served = serve(api_keys=(API,))
    answer = served.http.delete("/v1/steering/vectors/kind", headers=bearer(API))
    assert answer.status_code == 403
    assert "--admin-key" in answer.json()["error"]["message"]


def test_the_admin_key_changes_and_check_needs_none(guarded):
    """The dry run is a question, not a change."""
    data = to_bytes(toy_vector("new"))
    put = guarded.http.put("/v1/steering/vectors/new", content=data, headers=bearer(ADMIN))
    assert put.status_code == 201
    check = guarded.http.post("/v1/steering/check", json={"steering": "1 new"}, headers=bearer(API))
    assert check.status_code == 200


def test_an_admin_key_alone_guards_the_api_too(serve):
    """An operator who sets any key does not expect an open API."""
    served = serve(admin_keys=(ADMIN,))
    assert served.http.get("/v1/models").status_code == 401
    assert served.http.get("/v1/models", headers=bearer(ADMIN)).status_code == 200


def test_without_keys_everything_is_open(fake_served):
    """One person on one machine needs no keys."""
    data = to_bytes(toy_vector("mine"))
    assert fake_served.http.put("/v1/steering/vectors/mine", content=data).status_code == 201


def test_keys_beyond_ascii_are_compared_as_bytes():
    """compare_digest raises on text beyond ASCII, which would be a 500."""
    assert is_known("schlüssel-ö".encode().decode("latin-1"), ("schlüssel-ö",))
    assert not is_known("ÿ", ("schlüssel-ö",))
    assert not is_known("", ())

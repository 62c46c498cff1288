"""The Library tab against a server: what it stores, deletes and hands out is what the API has."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from running_server import NAME, Served, running
from serving_fakes import FakeEngine, model_ref, toy_vector
from toy_classifier import toy_classifier

from trimtab.serving.settings import ServerSettings
from trimtab.steering import vector
from trimtab.steering.gguf import from_gguf, to_gguf
from trimtab.steering.store import Store
from trimtab.ui.client import ServerError
from trimtab.ui.page.api import Api
from trimtab.ui.page.chat_tab import ChatTab
from trimtab.ui.page.chat_view import PLAIN
from trimtab.ui.page.download import file_value
from trimtab.ui.page.library import Item
from trimtab.ui.page.library_tab import LibraryTab
from trimtab.ui.page.visitor import Visitors

WHO = SimpleNamespace(session_hash="somebody", query_params={})
USER, ADMIN = "somebodys-key", "admins-key"
ASKED = ("", "up", "own")
Steps = Callable[[LibraryTab], Awaitable[Any]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server with two vectors, a classifier and a preset, whose changes ask for a key."""
    store = Store(tmp_path / "store")
    store.put_vector(toy_vector("kind", seed=1))
    store.put_vector(toy_vector("formal", seed=2))
    store.put_classifier(toy_classifier(model_ref()))
    settings = ServerSettings(served_model_name=NAME, api_keys=(USER,), admin_keys=(ADMIN,))
    headers = {"authorization": f"Bearer {ADMIN}"}
    with running(FakeEngine(), store, settings=settings, headers=headers) as one:
        spec = {"vectors": [{"id": "kind", "scale": 0.5}]}
        assert one.http.put("/v1/steering/presets/nice", json=spec).status_code == 201
        yield one


def use(served: Served, steps: Steps, *, key: str = ADMIN) -> Any:
    """Open the tab as somebody with a key, and do something there."""

    async def visit() -> Any:
        api = Api(served.url, key=key)
        visitors = Visitors(api)
        with gr.Blocks(), gr.Tabs() as tabs:
            with gr.Tab("Chat"):
                chat = ChatTab(visitors)
            with gr.Tab("Library") as tab:
                library = LibraryTab(visitors, tab=tab, tabs=tabs, chat=chat)
        try:
            return await steps(library)
        finally:
            await api.close()

    return asyncio.run(visit())


async def choose(library: LibraryTab, kind: str, name: str) -> list[Any]:
    return await library._chosen(WHO, SimpleNamespace(id=name), kind, *ASKED)


def test_what_somebody_else_deleted_is_told_in_the_servers_words(served):
    """Catches a detail of something that is gone, and a list that still offers it."""

    async def steps(library):
        await library._opened(WHO, "vector", *ASKED)
        served.store.delete_vector("kind")
        return await choose(library, "vector", "kind")

    notice, listed, detail, *_ = use(served, steps)
    said = served.http.get("/v1/steering/vectors/kind").json()["error"]["message"]
    assert "kind" in said
    assert said.replace("'", "&#x27;") in notice
    assert ">kind</button>" not in listed
    assert ">formal</button>" in listed
    assert "<h2>" not in detail


def test_of_two_presses_the_second_is_shown_last(served):
    """Catches the first card's details coming late, in the place of the second's."""
    ended = []

    async def steps(library):
        show = library.similarities.show
        waits = iter((0.3, 0.0))

        async def slow_at_first(*args):
            await asyncio.sleep(next(waits))
            return await show(*args)

        library.similarities.show = slow_at_first

        async def press(name):
            await choose(library, "vector", name)
            ended.append(name)

        await asyncio.gather(press("kind"), press("formal"))

    use(served, steps)
    assert ended == ["kind", "formal"]


def test_a_press_that_was_overtaken_on_its_way_changes_nothing(served):
    """Catches the first card shown because the second press arrived before the first."""

    async def steps(library):
        for name, press in (("formal", 2), ("kind", 1)):
            event = SimpleNamespace(id=name, press=press)
            shown = await library._chosen(WHO, event, "vector", *ASKED)
        return shown

    assert "<h2>formal</h2>" in use(served, steps)[2]


def test_two_presses_on_what_is_gone_are_both_told(served):
    """Catches a traceback where the second press comes while the server says why of the first."""

    async def steps(library):
        await library._opened(WHO, "vector", *ASKED)
        api = library.visitors.of(WHO).api
        get, late = api.get, []

        async def pressed_meanwhile(path, **query):
            if path.endswith("/gone"):
                late.append(asyncio.create_task(choose(library, "vector", "gone-too")))
                await asyncio.sleep(0)
            return await get(path, **query)

        api.get = pressed_meanwhile
        first = await choose(library, "vector", "gone")
        return first, await late[0]

    for notice, _, detail, *_ in use(served, steps):
        assert "Unknown vector" in notice
        assert "<h2>" not in detail


def test_nothing_is_deleted_without_the_question(served):
    """Catches a Delete that needs one press, or that deletes what was chosen after it was asked."""

    async def steps(library):
        await choose(library, "vector", "kind")
        await library.removal._deleted(WHO)
        assert set(served.store.presets()) == {"nice"}
        assert {v.id for v in served.store.vectors()} == {"formal", "kind"}
        _, box, question, button = await library.removal._asked(WHO)
        assert box.visible
        assert button == "Delete the vector kind"
        assert "<li>nice</li>" in question
        await choose(library, "vector", "formal")
        await library.removal._deleted(WHO)
        assert {v.id for v in served.store.vectors()} == {"formal", "kind"}
        await choose(library, "vector", "kind")
        await library.removal._asked(WHO)
        await library.removal._kept(WHO)
        await library.removal._deleted(WHO)
        assert {v.id for v in served.store.vectors()} == {"formal", "kind"}
        await library.removal._asked(WHO)
        notice, _ = await library.removal._deleted(WHO)
        assert "Deleted the vector kind." in notice
        assert {v.id for v in served.store.vectors()} == {"formal"}
        _, listed, detail, *_ = await library._changed(WHO, "vector", *ASKED)
        assert ">kind</button>" not in listed
        assert "<h2>" not in detail
        settings = {"vectors": [{"id": "kind", "scale": 1.0}]}
        return await library._chat_refreshed(WHO, settings, "kind")

    panel, colour = use(served, steps)
    assert [card["id"] for card in panel.props["catalogue"]["vectors"]] == ["formal"]
    assert panel.value["vectors"] == []
    assert colour.value == PLAIN


def test_a_question_stays_while_what_it_is_about_is_chosen(served):
    """Catches a list that comes late and takes away the question that was asked meanwhile."""

    async def steps(library):
        await choose(library, "vector", "kind")
        opening = asyncio.create_task(library._opened(WHO, "vector", *ASKED))
        await asyncio.sleep(0)  # it asks the server what is stored
        asked = await library.removal._asked(WHO)
        assert opening.done()
        again = await library._opened(WHO, "vector", *ASKED)
        other = await choose(library, "vector", "formal")
        return asked[1], again[5], other[5], await library.removal._deleted(WHO)

    asked, again, other, deleted = use(served, steps)
    assert asked.visible
    assert again.visible
    assert not other.visible
    assert deleted[0] == gr.skip()  # the question was about another
    assert served.http.get("/v1/steering/vectors/kind").status_code == 200


def test_a_key_that_may_not_is_refused_in_the_servers_words(served):
    """Catches a refusal that is shown as success, or not at all."""

    async def steps(library):
        await choose(library, "vector", "kind")
        await library.removal._asked(WHO)
        deletion, _ = await library.removal._deleted(WHO)
        file = file_value("x", vector.to_bytes(toy_vector("x")))
        upload, *_ = await library.upload._stored(WHO, file, "vector", "new", False)
        return deletion, upload

    for notice in use(served, steps, key=USER):
        assert "tt-problem" in notice
        assert "admin" in notice
    assert {v.id for v in served.store.vectors()} == {"formal", "kind"}


@pytest.mark.parametrize(
    ("data", "kind", "name", "said"),
    [
        (b"rubbish", "vector", "new", "not a"),
        (b"", "vector", "new", "0 bytes"),
        (None, "vector", "new", "Choose a file"),
        ("a vector's", "classifier", "new", "expected a"),
        ("a vector's", "vector", "../new", "cannot be a name"),
        ("a vector's", "vector", "", "cannot be a name"),
        ("a vector's", "vector", "kind", "There is the vector kind already"),
        ("another model's", "vector", "new", "model"),
    ],
)
def test_a_file_that_is_refused_is_not_stored(served, data, kind, name, said):
    """Catches a half-stored file, one in the place of another, and a refusal without its reason."""
    made = {
        "a vector's": toy_vector("x", seed=7),
        "another model's": toy_vector("x", ref=model_ref(fingerprint="0" * 64)),
    }
    if isinstance(data, str):
        data = vector.to_bytes(made[data])
    before = {v.id: v.digest for v in served.store.vectors()}
    file = None if data is None else file_value("x", data)

    async def steps(library):
        return await library.upload._stored(WHO, file, kind, name, False)

    notice, *rest = use(served, steps)
    assert "tt-problem" in notice
    assert said in notice
    assert rest == [gr.skip()] * 3  # the form keeps what was typed
    assert {v.id: v.digest for v in served.store.vectors()} == before
    assert {c.id for c in served.store.classifiers()} == {"tone"}


def test_a_file_is_stored_under_the_typed_name_and_shown(served):
    """Catches an upload that nobody sees until the page opens anew, or that replaces unasked."""
    one, two = toy_vector("x", seed=7), toy_vector("y", seed=8)

    async def steps(library):
        stored = library.upload._stored
        file = file_value("x", vector.to_bytes(one))
        notice, file_left, *_ = await stored(WHO, file, "vector", " new ", False)
        assert "Stored the vector new." in notice
        assert file_left is None
        assert served.store.vector("new").digest == one.digest
        kind, listed, detail, *_ = await library._changed(WHO, "preset", *ASKED)
        assert kind == "vector"
        assert ">new</button>" in listed
        assert "<h2>new</h2>" in detail
        await stored(WHO, file_value("x", vector.to_bytes(two)), "vector", "new", True)
        assert served.store.vector("new").digest == two.digest
        await stored(WHO, file_value("x", to_gguf(one)), "vector", "foreign", False)
        return served.store.vector("foreign")

    assert use(served, steps).method == "gguf"


def test_downloads_are_what_the_server_has(served):
    """Catches a file that was cut, renamed or made anew on its way."""

    async def steps(library):
        await choose(library, "vector", "kind")
        saved, exported = (await library._saved(WHO))[1], (await library._exported(WHO))[1]
        await choose(library, "preset", "nice")
        return saved, exported, (await library._saved(WHO))[1]

    saved, exported, preset = use(served, steps)
    kind = served.store.vector("kind")
    assert (saved["name"], exported["name"]) == ("kind.safetensors", "kind.gguf")
    data = base64.b64decode(saved["data"])
    assert data == served.http.get("/v1/steering/vectors/kind/content").content
    assert vector.from_bytes(data, name="kind").digest == kind.digest
    back = from_gguf(base64.b64decode(exported["data"]), id="kind", name="kind")
    assert back.layers[-1] == kind.layers[-1]
    spec = served.http.get("/v1/steering/presets/nice").json()["spec"]
    assert preset["name"] == "nice.json"
    assert json.loads(base64.b64decode(preset["data"])) == spec


def test_a_file_too_long_for_the_page_is_refused_with_another_way(served, monkeypatch):
    """Catches a download that fills the memory of the page's process."""
    monkeypatch.setattr("trimtab.ui.page.api.MAX_FILE_BYTES", 100)

    async def steps(library):
        await choose(library, "vector", "kind")
        return await library._saved(WHO)

    notice, file = use(served, steps)
    assert file is None
    assert "curl -OJ" in notice
    assert "/v1/steering/vectors/kind/content" in notice


def test_try_in_chat_sets_the_panel_and_goes_there(served):
    """Catches a button that leaves the visitor where they were, or steers with something else."""

    async def steps(library):
        await choose(library, "vector", "kind")
        return await library._tried(WHO)

    notice, panel, _, said, tabs = use(served, steps)
    assert notice == ""
    assert panel.value == {"vectors": [{"id": "kind", "scale": 1.0}]}
    assert "the vector kind" in said
    assert tabs.selected == "chat"


def test_cosines_are_the_apis(served):
    """Catches a table of other numbers than the API's, and a layer that is not asked for."""

    async def steps(library):
        _, *own = await choose(library, "vector", "kind")
        own = own[-1]
        return own, await library.similarities._compared(WHO, "0")

    own, first = use(served, steps)
    for html, query in ((own, {}), (first, {"layer": 0})):
        answer = served.http.get("/v1/steering/similarities", params=query).json()
        cosine = answer["matrix"][0][1]
        assert cosine != 0
        assert f'title="formal and kind: {cosine:+.4f}"' in html
    assert "at layer 0" in first


def test_a_server_that_is_gone_is_told(served):
    """Catches a page that stays empty without a word."""

    async def steps(library):
        library.visitors.api.url = "http://127.0.0.1:9"
        shown = await library._opened(WHO, "vector", *ASKED)
        assert "cannot be reached" in shown[0]
        with pytest.raises(ServerError, match="Choose something"):
            await library._card(library.visitors.of(WHO))
        return Item("vector", "kind")

    use(served, steps)

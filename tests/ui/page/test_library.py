"""What the Library shows: strangers' words as words, what presets name, how alike vectors are."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
from serving_fakes import model_ref, toy_vector
from toy_classifier import toy_classifier

from trimtab.steering.spec import parse_spec
from trimtab.ui.page.download import file_value
from trimtab.ui.page.library import Item, Library, StoredNameError, named
from trimtab.ui.page.library_card import card_html
from trimtab.ui.page.library_list import list_html
from trimtab.ui.page.library_removal import question_html
from trimtab.ui.page.library_try import chat_settings, without
from trimtab.ui.page.run_settings import read_settings
from trimtab.ui.page.similarity_view import MOST, neighbours_html, similarity_html
from trimtab.ui.page.upload import UploadError, file_bytes

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e{{value}}${value}"
NESTED = {
    "vectors": [{"id": "warm", "when": {"probe": "calm", "above": 0.5}}],
    "ablate": [{"id": "rude", "when": {"probe": "tone/expert", "below": 0.5}}],
    "guidance": [
        {"classifier": "mood", "target": ["glad"], "when": {"probe": "shy", "above": 0.1}}
    ],
    "when": {"probe": "topic/sea", "above": 0.9},
}


def preset(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "model": f"toy:{name}", "spec": spec}


def library_of(*, vectors=(), classifiers=(), presets=(), problems=None) -> Library:
    def by_id(cards):
        return {card["id"]: card for card in cards}

    return Library(
        {
            "vector": by_id(vector.card() for vector in vectors),
            "classifier": by_id(classifier.card() for classifier in classifiers),
            "preset": by_id(presets),
        },
        {"vector": problems or {}, "classifier": {}, "preset": {}},
    )


def detail(item: Item, library: Library) -> str:
    return card_html(item, library.cards[item.kind][item.id], library)


def test_a_preset_names_what_its_gates_read_too():
    """Catches a deletion that says it breaks nothing and breaks a gate, wherever that stands."""
    spec = parse_spec(NESTED).model_dump(mode="json", exclude_defaults=True)
    assert set(named(spec)) == {
        Item("vector", "warm"),
        Item("vector", "calm"),
        Item("vector", "rude"),
        Item("classifier", "tone"),
        Item("classifier", "mood"),
        Item("vector", "shy"),
        Item("classifier", "topic"),
    }


@pytest.mark.parametrize("item", named(NESTED), ids=str)
def test_a_deletion_says_which_presets_it_breaks(item):
    """Catches a question that leaves out a preset, or names one that would go on working."""
    plain = preset("untouched", {"vectors": [{"id": "other", "scale": 1.0}]})
    library = library_of(presets=[preset("deep", NESTED), plain])
    question = question_html(item, library)
    assert f"Delete the {item.kind} {item.id}?" in question
    assert "<li>deep</li>" in question
    assert "untouched" not in question
    other = Item("classifier" if item.kind == "vector" else "vector", item.id)
    assert "deep" not in question_html(other, library)  # of the same name, and not what is named


def test_what_files_say_is_never_html():
    """Catches a vector from elsewhere whose words run in the browser of whoever looks at it."""
    wild = {
        HOSTILE: HOSTILE,
        "deep": {HOSTILE: [HOSTILE]},
        "name": HOSTILE,
        "skipped": {HOSTILE: 1},
    }
    common = {"description": HOSTILE, "created": HOSTILE, "trimtab_version": HOSTILE}
    ref = model_ref(id=HOSTILE, quantization=HOSTILE, model_type=HOSTILE)
    vector = replace(
        toy_vector("v", ref=ref),
        method=HOSTILE,
        data=wild,
        settings=wild,
        calibration={HOSTILE: HOSTILE, "curve": HOSTILE},
        **common,
    )
    classifier = replace(
        toy_classifier(ref, id="c"), data=wild, settings=wild, metrics={"1": wild}, **common
    )
    spec = preset("p", {"vectors": [{"id": HOSTILE, "note": HOSTILE}]})
    library = library_of(
        vectors=[vector], classifiers=[classifier], presets=[spec], problems={HOSTILE: HOSTILE}
    )
    items = [Item("vector", "v"), Item("classifier", "c"), Item("preset", "p")]
    shown = [list_html(library, item.kind, search="", chosen=item) for item in items]
    shown += [detail(item, library) for item in items]
    shown.append(question_html(Item("vector", HOSTILE), library))
    cosines = {"ids": [HOSTILE, "b"], "layer": None, "matrix": [[1.0, None], [None, 1.0]]}
    shown.append(similarity_html(cosines, HOSTILE))
    for html in shown:
        assert "<img" not in html
        assert "\u202e" not in html
        assert "&lt;img" in html
        assert "{{value}}" not in html.replace("{{value}}${value}", "")


@pytest.mark.parametrize(
    "odd",
    [
        {"probe_accuracy": "all of them"},
        {"probe_accuracy": [2.0, -1.0]},
        {"probe_accuracy": [0.5]},
        {"probe_accuracy": [None, {}]},
        {"n_fit": "many", "n_held": None, "name": ["a", 1]},
        {"skipped": [1, 2]},
    ],
)
def test_a_strange_file_is_shown_all_the_same(odd):
    """Catches a file whose free fields break the page for everybody who lists it."""
    import torch

    vector = replace(toy_vector("v"), data=odd, probe=torch.ones(2, 2), probe_layer=1)
    library = library_of(vectors=[vector], classifiers=[toy_classifier(model_ref(), id="c")])
    assert ">v</button>" in list_html(library, "vector")
    assert "layer 1" in detail(Item("vector", "v"), library)
    strange = replace(toy_classifier(model_ref(), id="c"), data=odd, metrics={"x": 1, "1": odd})
    assert "casual" in detail(Item("classifier", "c"), library_of(classifiers=[strange]))


def test_origin_is_told_in_full():
    """Catches a detail that leaves out on what, when, by whom and on which weights it was built."""
    import torch

    vector = replace(
        toy_vector("v", ref=model_ref(quantization="nvfp4 gptq")),
        data={
            "name": "letters",
            "sha256": "ab" * 32,
            "n_fit": 36,
            "n_held": 9,
            "probe_accuracy": [0.5, 0.75],
        },
        settings={"position": "mean"},
        probe=torch.ones(2, 2),
        probe_layer=1,
        created="2026-11-21T08:02:42+00:00",
        trimtab_version="0.1.0",
        description="says letters",
    )
    library = library_of(vectors=[vector], presets=[preset("uses", {"vectors": [{"id": "v"}]})])
    html = detail(Item("vector", "v"), library)
    for told in (
        "letters, 36 fit, 9 held",
        "position mean",
        "nvfp4 gptq",
        "2026-11-21 08:02",
        "says letters",
    ):
        assert told in html
    assert "trimtab 0.1.0" in html
    assert f'title="{"ab" * 32}">abababababab…' in html
    assert f'title="{"f" * 64}"' in html
    assert "75.0% at layer 1" in html
    assert "from letters (36 examples)" in list_html(library, "vector")
    assert "Named by the preset uses." in html
    assert "raw length" in html  # not calibrated


def test_a_preset_that_names_what_is_gone_says_so():
    """Catches a broken preset that looks whole."""
    library = library_of(vectors=[toy_vector("v")], presets=[preset("p", NESTED)])
    html = detail(Item("preset", "p"), library)
    assert "the vector warm, <b>which is not stored here</b>" in html
    assert "requests for it fail" in html
    whole = library_of(vectors=[toy_vector("v")], presets=[preset("p", {"vectors": [{"id": "v"}]})])
    assert "not stored" not in detail(Item("preset", "p"), whole)


def test_the_list_is_searched_and_ordered():
    """Catches a search that misses a description, and an order that is not the one asked for."""
    vectors = [
        replace(toy_vector("beta"), description="of the Sea", created="2026-01-02T00:00:00+00:00"),
        replace(toy_vector("Alpha"), created="2026-01-01T00:00:00+00:00"),
        replace(toy_vector("gamma"), created="2026-01-03T00:00:00+00:00"),
    ]
    library = library_of(vectors=vectors)

    def names(**asked):
        html = list_html(library, "vector", **asked)
        return sorted(("Alpha", "beta", "gamma"), key=lambda name: html.find(f">{name}</button>"))

    assert names(order="up") == ["Alpha", "beta", "gamma"]
    assert names(order="down") == ["gamma", "beta", "Alpha"]
    assert names(order="new") == ["gamma", "beta", "Alpha"]
    found = list_html(library, "vector", search=" SEA caa ")
    assert ">beta</button>" in found
    assert "Alpha" not in found
    assert "1 of 3 vectors" in found
    assert "No presets are stored yet." in list_html(library, "preset")


def test_what_is_chosen_is_marked_for_eyes_and_ears():
    """Catches a choice that only a colour tells, or two things chosen at once."""
    library = library_of(vectors=[toy_vector("a"), toy_vector("b")])
    html = list_html(library, "vector", chosen=Item("vector", "b"))
    assert html.count('aria-pressed="true"') == 1
    assert '<button type="button" aria-pressed="true">b</button>' in html
    assert 'aria-pressed="true"' not in list_html(library, "vector", chosen=Item("preset", "b"))


@pytest.mark.parametrize("name", ["", "..", "a/b", "../vectors/a", "a?b", "é", "a" * 65, "a\nb"])
def test_a_name_is_no_path(name):
    """Catches a typed name that reaches another place of the API."""
    with pytest.raises(StoredNameError, match="cannot be a name"):
        _ = Item("vector", name).path


def matrix_of(ids: list[str], values: dict[tuple[str, str], float | None]) -> dict[str, Any]:
    def cosine(a: str, b: str) -> float | None:
        return 1.0 if a == b else values.get((a, b), values.get((b, a), 0.0))

    return {"ids": ids, "layer": None, "matrix": [[cosine(a, b) for b in ids] for a in ids]}


def test_cosines_are_told_with_their_sign_and_in_words():
    """Catches a table whose colour says more than its text, and neighbours that are none."""
    answer = matrix_of(["a", "b", "c", "d"], {("a", "b"): 0.75, ("a", "c"): -0.5, ("a", "d"): None})
    html = similarity_html(answer, "a")
    assert "nearest to b (+0.75); most against c (−0.50); not comparable with 1" in html
    assert html.count(">+0.75</td>") == html.count(">−0.50</td>") == 2
    assert "no layer or model in common" in html
    assert "nearest" not in similarity_html(answer, None)
    assert "unrelated" in neighbours_html("b", {"a": 0.02, "b": 1.0})
    assert "−0.00" not in similarity_html(matrix_of(["a", "b"], {("a", "b"): -0.001}), None)
    assert "nothing to compare" in similarity_html(matrix_of(["a"], {}), "a")


def test_of_many_vectors_the_nearest_are_in_the_table():
    """Catches a page of hundreds of columns, and one that leaves the chosen vector out."""
    ids = [f"v{i:03}" for i in range(200)]
    near = {("v150", f"v{i:03}"): -0.9 if i % 2 else 0.9 for i in range(160, 160 + MOST - 1)}
    html = similarity_html(matrix_of(ids, near), "v150")
    assert html.count("<tr>") == MOST + 1
    for name in ("v150", *(other for _, other in near)):
        assert f'<th scope="row" title="{name}">{name}</th>' in html
    assert f"{MOST} of 200 vectors" in html


def test_what_is_tried_is_something_the_chat_can_run():
    """Catches settings that the panel refuses, and steering past the measured dose."""
    classifier = toy_classifier(model_ref(), id="tone")
    tried = chat_settings(Item("classifier", "tone"), classifier.card())
    settings = read_settings(tried)
    assert settings.steering == {
        "guidance": [{"classifier": "tone", "target": ["casual"], "scale": 1.0}]
    }
    assert settings.probes == ["tone"]
    without_dose = replace(classifier, doses=()).card()
    assert read_settings(chat_settings(Item("classifier", "tone"), without_dose)).steering is None
    vector = read_settings(chat_settings(Item("vector", "v"), toy_vector("v").card()))
    assert vector.steering == {"vectors": [{"id": "v", "scale": 1.0}]}
    assert read_settings(chat_settings(Item("preset", "p"), {})).preset == "p"


def test_what_is_deleted_leaves_the_chat():
    """Catches a slider, gate or probe that stays and fails every run, or one too many gone."""
    settings = {
        "preset": "p",
        "vectors": [{"id": "x", "scale": 1.0}, {"id": "y", "scale": 2.0}],
        "ablate": ["x", "y"],
        "guidance": [{"classifier": "x", "target": ["a"], "avoid": [], "scale": 1.0}],
        "when": {"probe": "x", "above": 0.5},
        "probes": ["x", "y"],
    }
    left = without(settings, Item("vector", "x"))
    assert read_settings(left).model_dump()["vectors"] == [{"id": "y", "scale": 2.0}]
    assert (left["ablate"], left["when"], left["probes"]) == (["y"], None, ["y"])
    assert left["guidance"] == settings["guidance"]
    left = without(settings, Item("classifier", "x"))
    assert left["guidance"] == []
    assert (left["vectors"], left["when"]) == (settings["vectors"], settings["when"])
    gated = {"when": {"probe": "x/a", "above": 0.5}}
    assert without(gated, Item("classifier", "x"))["when"] is None
    assert without(gated, Item("vector", "x"))["when"] == gated["when"]
    assert without(settings, Item("preset", "p")) == settings | {"preset": None}
    assert without({}, Item("vector", "x"))["vectors"] == []


def test_a_file_goes_through_the_page_unchanged(monkeypatch):
    """Catches a byte lost on the way, and a broken or endless file that reaches the API."""
    data = bytes(range(256)) * 3
    assert file_bytes(file_value("all.bin", data)) == data
    assert file_bytes({"name": "empty", "data": ""}) == b""
    for value in (None, {}, "text", {"data": 5}, {"data": "?"}, {"data": "é"}, {"data": "QQ"}):
        with pytest.raises(UploadError):
            file_bytes(value)
    monkeypatch.setattr("trimtab.ui.page.upload.MAX_FILE_BYTES", 300)
    assert file_bytes({"data": base64.b64encode(data[:300]).decode()}) == data[:300]
    with pytest.raises(UploadError, match="longer than"):
        file_bytes({"data": base64.b64encode(data).decode()})

"""What can be built without data, over HTTP: the bundled sets as they are."""

from __future__ import annotations

import json

from trimtab.training.classifiers import readers
from trimtab.training.vectors import pairs
from trimtab.ui.cli import run

URL = "/v1/steering/concepts"


def test_every_bundled_set_is_listed_as_it_is(fake_served):
    """Catches a list kept by hand that falls behind the data, or counts of another split."""
    body = fake_served.http.get(URL).json()
    assert body["object"] == "list"
    assert {card["object"] for card in body["data"]} == {"steering.concept"}
    found = {kind: {c["id"]: c for c in body["data"] if c["kind"] == kind}
             for kind in ("vector", "classifier")}  # fmt: skip
    assert sum(map(len, found.values())) == len(body["data"])
    assert list(found["vector"]) == pairs.concepts()
    for name, card in found["vector"].items():
        data = pairs.concept(name)
        assert (card["n_build"], card["n_held"]) == (len(data.build), len(data.held))
        example = pairs.Pair(**{"prompt": ""} | card["example"])
        assert example in data.build
    assert list(found["classifier"]) == readers.bundled_names()
    for name, card in found["classifier"].items():
        data = readers.bundled(name)
        assert card["labels"] == list(data.labels)
        assert card["n_examples"] == len(data.examples)


def test_the_command_line_lists_the_same(fake_served, capsys):
    """Catches two lists of one thing that drift apart."""
    assert run(["vectors", "concepts", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    data = fake_served.http.get(URL).json()["data"]
    assert [{"object": "steering.concept", **card} for card in shown] == [
        card for card in data if card["kind"] == "vector"
    ]

"""Vectors and presets from the command line, on a store that no model was needed for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from cli_program import vector

from trimtab.steering.vector import VectorArtifact, to_bytes

HOSTILE = ("../evil", "/etc/evil", "a/b", "..", "", "a\nb", ".hidden", "x" * 65)


def test_list_and_show(trimtab, store):
    """Catches a listing that hides a vector, or JSON that a program cannot read."""
    store.put_vector(vector())
    store.put_vector(vector("cold", is_calibrated=False))
    done = trimtab("vectors", "list")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["cold", "warm"]
    assert done.err.startswith("Next: trimtab vectors show")
    listed = trimtab("vectors", "list", "--json").json
    assert [card["id"] for card in listed["vectors"]] == ["cold", "warm"]
    assert trimtab("vectors", "show", "warm", "--json").json == json.loads(
        json.dumps(vector().card())
    )
    assert "Not calibrated" in trimtab("vectors", "show", "cold").err


def test_curve_marks_the_knee(trimtab, store):
    """Catches a chart without a bar, on the wrong side, or that marks another scale."""
    store.put_vector(vector())
    chart = trimtab("vectors", "show", "warm").out.partition("Calibration")[2].splitlines()[2:]
    assert [line.split()[0] for line in chart] == ["-1", "+0", "+1", "+4"]
    assert ["knee" in line for line in chart] == [False, False, True, False]
    effects = [line.partition("|") for line in chart]
    assert effects[0][0].count("█") > 0
    assert "█" not in effects[1][0]
    assert effects[3][2].count("█") > effects[2][2].count("█")
    assert chart[3].endswith(">")  # past the damage that is drawn


MAP = {
    "layers": [[1], [2], [1, 2]],
    "scales": [-1.0, 4.0],
    "dose": 0.0475,
    "effect": [[-0.25, 0.5], [0.031, None], [0.0, 1.25]],
    "rise": [[0.024, 0.071], [-0.004, None], [12.5, 2.446]],
    "n_pairs": 8,
}


def mapped(name: str, found: Any) -> VectorArtifact:
    plain = vector(name)
    return replace(plain, calibration={**plain.calibration, "map": found})


def test_a_map_is_shown_where_there_is_one(trimtab, store):
    """Catches a map with rows and columns swapped, effect given as damage, an unmarked default, or
    a vector without a map that can no longer be shown."""
    store.put_vector(mapped("far", MAP))
    store.put_vector(vector("plain"))
    assert "Map" not in trimtab("vectors", "show", "plain").out
    shown = trimtab("vectors", "show", "far").out.partition("Map on")[2].splitlines()
    assert shown[0].split()[:5] == ["8", "pairs,", "dose", "0.048", "a"]
    assert [line.split() for line in shown[1:]] == [
        ["layers", "-1", "+4"],
        ["1*", "-0.25", "+2%", "+0.50", "+7%"],
        ["2", "+0.03", "+0%", "-", "-"],
        ["1-2", "+0.00", ">999%", "+1.25", "+245%"],
    ]
    assert trimtab("vectors", "show", "far", "--json").json["calibration"]["map"] == MAP


@pytest.mark.parametrize(
    "found", [[], "map", {}, {**MAP, "effect": [[1.0]]}, {**MAP, "layers": [["a"], [2], [3]]},
              {**MAP, "rise": [["x", 1], [1, 1], [1, 1]]}, {**MAP, "dose": None}],
    ids=range(7),
)  # fmt: skip
def test_a_foreign_map_does_not_hide_the_rest(found, trimtab, store):
    """Catches a file from elsewhere whose map ends `show` in a traceback."""
    store.put_vector(mapped("odd", found))
    done = trimtab("vectors", "show", "odd")
    assert done.code == 0, done.err
    assert "knee" in done.out
    assert "not of trimtab's form" in done.err


def test_an_empty_store_says_what_to_do(trimtab):
    """Catches an empty page."""
    done = trimtab("vectors", "list")
    assert done.code == 0
    assert done.out == ""
    assert "trimtab vectors build" in done.err
    assert trimtab("vectors", "list", "--json").json == {"vectors": [], "problems": {}}
    assert trimtab("presets", "list", "--json").json == []


def test_a_damaged_file_is_named_and_the_rest_is_listed(trimtab, store):
    """Catches one bad file that hides all vectors, or hides itself."""
    store.put_vector(vector())
    (store.folder / "vectors" / "torn.safetensors").write_bytes(to_bytes(vector())[:100])
    done = trimtab("vectors", "list")
    assert "warm" in done.out
    assert "torn.safetensors" in done.err
    assert len(trimtab("vectors", "list", "--json").json["problems"]) == 1
    assert trimtab("vectors", "delete", "torn", "--yes").code == 0
    assert trimtab("vectors", "list", "--json").json["problems"] == {}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_export_then_import(kind, trimtab, store, tmp_path):
    """Catches a vector that changes on its way through a file."""
    store.put_vector(vector(size=0.5))
    file = tmp_path / f"out.{kind}"
    assert trimtab("vectors", "export", "warm", str(file)).code == 0
    done = trimtab("vectors", "import", str(file), "--id", "again")
    assert done.code == 0, done.err
    again = store.vector("again")
    assert again.default_layers == (1,)
    assert torch.equal(again.row(1), torch.full((8,), 0.5))
    if kind == "safetensors":
        assert again.renamed("warm").card() == vector(size=0.5).card()


def test_nothing_is_overwritten_unasked(trimtab, store, tmp_path):
    """Catches a vector or file that is lost to a second command."""
    store.put_vector(vector(size=1.0))
    file = tmp_path / "out.safetensors"
    file.write_text("mine")
    assert trimtab("vectors", "export", "warm", str(file)).code == 1
    assert file.read_text() == "mine"
    file.write_bytes(to_bytes(vector(size=2.0)))
    assert trimtab("vectors", "import", str(file)).code == 1
    assert float(store.vector("warm").row(1)[0]) == 1.0
    assert trimtab("vectors", "build", "--concept", "honest", "--id", "warm").code == 1
    assert trimtab("vectors", "import", str(file), "--overwrite").code == 0
    assert float(store.vector("warm").row(1)[0]) == 2.0
    assert trimtab("presets", "save", "mild", "0.5 warm").code == 0
    assert trimtab("presets", "save", "mild", "0.9 warm").code == 1
    assert trimtab("presets", "save", "mild", "0.9 warm", "--overwrite").code == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_ids_cannot_leave_the_store(name, trimtab, store, home, tmp_path):
    """Catches a path in an id, typed or hidden in a file, that writes or removes elsewhere."""
    store.put_vector(vector())
    before = sorted(path for path in tmp_path.rglob("*"))
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(to_bytes(vector(name)))
    for args in (
        ("vectors", "import", str(file)),
        ("vectors", "import", str(file), "--id", name or "../evil"),
        ("vectors", "show", name),
        ("vectors", "delete", name, "--yes"),
        ("vectors", "build", "--concept", "honest", "--id", name or "../evil"),
        ("presets", "save", name, "1.0 warm"),
        ("presets", "delete", name),
    ):
        done = trimtab(*args)
        assert done.code == 1, args
        assert len(done.err.strip().splitlines()) == 1
    file.unlink()
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x80\x04pickle", b"{}", b"\xff" * 64])
def test_foreign_files_are_refused(data, trimtab, tmp_path):
    """Catches bytes that are no vector being stored, or crashing the command."""
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(data)
    done = trimtab("vectors", "import", str(file))
    assert done.code == 1
    assert "failed unexpectedly" not in done.err


def test_import_does_not_read_for_ever(trimtab):
    """Catches a device or pipe given as a file, which has no end."""
    assert trimtab("vectors", "import", "/dev/zero").code == 1


def test_another_models_vector_is_not_filed_under_this_one(trimtab, tmp_path):
    """Catches a vector stored where it could only ever be refused."""
    file = tmp_path / "warm.safetensors"
    file.write_bytes(to_bytes(vector()))
    done = trimtab("vectors", "import", str(file), "--model", "other/model")
    assert done.code == 1
    assert "smollm2" in done.err


def test_delete(trimtab, store):
    """Catches a deletion that does not ask where nobody can answer, or does not delete."""
    store.put_vector(vector())
    assert trimtab("vectors", "delete", "warm").code == 2
    assert trimtab("vectors", "list", "--json").json["vectors"]
    assert trimtab("vectors", "delete", "warm", "--yes").code == 0
    assert trimtab("vectors", "list", "--json").json["vectors"] == []
    assert trimtab("vectors", "delete", "warm", "--yes").code == 1


def test_presets(trimtab, store):
    """Catches a preset that is not what was saved."""
    store.put_vector(vector())
    assert trimtab("presets", "save", "mild", "0.5 warm").code == 0
    assert trimtab("presets", "list").out.splitlines()[1].split() == [
        "mild",
        "smollm2:mild",
        "0.5",
        "warm",
    ]
    shown = trimtab("presets", "show", "mild", "--json").json
    assert shown["spec"] == {"vectors": [{"id": "warm", "scale": 0.5}]}
    assert trimtab("presets", "save", "gated", '{"ablate": [{"id": "warm"}]}').code == 0
    assert '"ablate"' in trimtab("presets", "show", "gated").out
    assert trimtab("presets", "delete", "mild").code == 0
    assert [p["id"] for p in trimtab("presets", "list", "--json").json] == ["gated"]


def test_concepts_and_methods(trimtab):
    """Catches a bundled data set or a registered method that is not shown."""
    from trimtab.attribution.methods import registry as attribution
    from trimtab.training.vectors import pairs, registry

    assert [c["id"] for c in trimtab("vectors", "concepts", "--json").json] == pairs.concepts()
    found = trimtab("methods", "--json").json
    for kind, known in (("vector", registry), ("attribution", attribution)):
        own = [m for m in found if m["kind"] == kind]
        assert [m["name"] for m in own] == sorted(known.METHODS)
        assert [m["name"] for m in own if m["is_default"]] == [known.DEFAULT]
        assert trimtab("methods", "--kind", kind, "--json").json == own
        shown = trimtab("methods", "--kind", kind).out
        assert all(f"  {m['name']} " in shown for m in own)
        assert all(f"{key}=" in shown for m in own for key in m["options"])
    assert all(m["source"] for m in found)
    for command in (("vectors", "concepts"), ("methods",)):
        done = trimtab(*command)
        assert done.code == 0
        assert "Next: trimtab" in done.err

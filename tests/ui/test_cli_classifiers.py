"""Classifiers from the command line: trained on the toy model, looked at, measured, moved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_classifier import toy_classifier

from trimtab.steering.artifact import ModelRef
from trimtab.steering.classifier import ClassifierArtifact, from_bytes, to_bytes

HOSTILE = ("../evil", "/etc/evil", "a/b", "..", "", ".hidden", "x" * 65)
SCORES = {
    "n": 12,
    "accuracy": 0.75,
    "macro_f1": 0.7,
    "log_loss": 0.5,
    "ece": 0.04,
    "auroc": {"casual": 0.9, "expert": None, "concise": 0.8},
    "confusion": [[4, 0, 0], [1, 3, 0], [0, 2, 2]],
}


def classifier(id: str = "tone", **changes: Any) -> ClassifierArtifact:
    """One of the default model's that no model was needed for."""
    made = toy_classifier(ModelRef("smollm2", "f" * 64, "llama", 8, 4), id=id)
    return replace(made, metrics={"1": SCORES}, description="how it sounds", **changes)


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Letters early or late in the alphabet, two answers a question."""
    rows = [
        {"prompt": f"q{i}", "text": letters * 2 + str(i), "label": label}
        for i in range(20)
        for label, letters in (("early", "abcab"), ("late", "xyzxy"))
    ]
    return written(tmp_path / "letters.jsonl", rows)


def test_train_show_and_eval(trimtab, toy_folder, texts):
    """Catches a trained classifier that cannot be found, or measures that are not its own."""
    model = ("--model", str(toy_folder))
    done = trimtab("classifiers", "train", "--texts", texts, "--id", "tone", "--hidden", "16",
                   "--layers", "1", "--seed", "2", "--position", "last", "--no-calibrate",
                   *model)  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == ""
    assert "Trained tone on 24 texts and 8 to validate" in done.err
    assert f"Next: trimtab classifiers show tone --model {toy_folder}" in done.err
    card = trimtab("classifiers", "show", "tone", "--json", *model).json
    assert card["labels"] == ["early", "late"]
    assert card["layers"] == [1]
    assert card["hidden_units"] == [16, 16]
    assert card["metrics"]["1"]["n"] == 8
    shown = trimtab("classifiers", "show", "tone", *model)
    assert "truth at layer 1" in shown.out
    assert "No calibrated doses" in shown.err
    again = trimtab("classifiers", "eval", "tone", "--texts", texts, "--json", *model)
    assert again.code == 0, again.err
    assert again.json["layers"]["1"]["n"] == 8  # those it did not learn from
    assert again.json["layers"]["1"]["accuracy"] == card["metrics"]["1"]["accuracy"]
    taken = trimtab("classifiers", "train", "--texts", texts, "--id", "tone", *model)
    assert taken.code == 1
    assert "--overwrite" in taken.err
    listed = trimtab("classifiers", "list", "--json", *model).json
    assert [card["id"] for card in listed["classifiers"]] == ["tone"]


def test_train_on_instructions_and_on_a_log(trimtab, toy_folder, tmp_path):
    """Catches a source that cannot be reached from the command line, or rows dropped unsaid."""
    model = ("--model", str(toy_folder), "--layers", "0,1", "--hidden", "16", "--no-calibrate")
    styles = tmp_path / "styles.json"
    styles.write_text(json.dumps({"a": "AAAA", "z": "ZZZZ"}), encoding="utf-8")
    asked = written(tmp_path / "asked.jsonl", [{"text": f"q{i}"} for i in range(12)])
    done = trimtab("classifiers", "train", "--instructions", str(styles), "--questions", asked,
                   "--id", "style", *model)  # fmt: skip
    assert done.code == 0, done.err
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{i}"}],
            "text": "aaa" if i % 2 else "zzz",
            "metadata": {} if i > 20 else {"liked": bool(i % 2)},
        }
        for i in range(24)
    ]
    log = written(tmp_path / "log.jsonl", rows)
    done = trimtab("classifiers", "train", "--log", log, "--label-from", "metadata.liked", "--id",
                   "liked", "--kind", "linear", "--position", "both", *model)  # fmt: skip
    assert done.code == 0, done.err
    assert "Left out: 3 rows of log.jsonl with no metadata.liked." in done.err
    card = trimtab("classifiers", "show", "liked", "--json", *model[:2]).json
    assert card["labels"] == ["false", "true"]
    assert card["hidden_units"] == []
    assert "3 with no metadata.liked" in trimtab("classifiers", "show", "liked", *model[:2]).out


def test_any_number_of_labels(trimtab, toy_folder, tmp_path):
    """Catches --multi-label without effect, or a table that only knows confusions."""
    rows = [
        {
            "text": ("aaa" if i % 2 else "mmm") + f"{i}" + ("zz" if i % 3 else "nn"),
            "labels": (["a"] if i % 2 else []) + (["z"] if i % 3 else []),
        }
        for i in range(48)
    ]
    texts = written(tmp_path / "texts.jsonl", rows)
    model = ("--model", str(toy_folder))
    done = trimtab("classifiers", "train", "--texts", texts, "--id", "many", *model)
    assert done.code == 1
    assert "--multi-label" in done.err
    done = trimtab("classifiers", "train", "--texts", texts, "--id", "many", "--multi-label",
                   "--hidden", "16", "--layers", "1", "--no-calibrate", *model)  # fmt: skip
    assert done.code == 0, done.err
    assert "rightly not" in trimtab("classifiers", "show", "many", *model).out


def test_calibrate(trimtab, toy_folder, texts, monkeypatch):
    """Catches doses that are found and not stored, or stored for other labels than were named."""
    model = ("--model", str(toy_folder))
    monkeypatch.setattr(
        "trimtab.training.coherence.Coherence.incoherent_share",
        lambda self, host, prompts, plan, **_: 0.04,
    )
    monkeypatch.setattr("trimtab.training.coherence.MAX_REPETITION", 1.0)  # the toy loops
    trimtab("classifiers", "train", "--texts", texts, "--id", "tone", "--hidden", "8",
            "--layers", "1", "--no-calibrate", *model)  # fmt: skip
    sets = ("--labels", "early,-late", "--labels", "late,-rival", "--prompts", "20")
    done = trimtab("classifiers", "calibrate", "tone", *sets, *model)
    assert done.code == 0, done.err
    assert "Calibrated 2 label sets of tone" in done.err
    doses = trimtab("classifiers", "show", "tone", "--json", *model).json["doses"]
    named = [(d["target"], d["avoid"], d["picks_rival"]) for d in doses]
    assert named == [(["early"], ["late"], False), (["late"], [], True)]
    assert "late" in trimtab("classifiers", "show", "tone", *model).out
    unknown = trimtab("classifiers", "calibrate", "tone", "--labels", "early,-middle", *model)
    assert (unknown.code, "middle" in unknown.err) == (1, True)
    both = trimtab("classifiers", "calibrate", "tone", "--labels", "early", "--pairs", *model)
    assert both.code == 2


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 2, "--id"),
        (("--id", "x"), 2, "Give one of"),
        (("--id", "x", "--texts", "T", "--log", "T", "--label-from", "a"), 2, "Give one of"),
        (("--id", "x", "--questions", "T"), 2, "go together"),
        (("--id", "x", "--log", "T"), 2, "--label-from go together"),
        (("--id", "x", "--texts", "T", "--label-from", "a"), 2, "go together"),
        (("--id", "x", "--texts", "T", "--layers", "1,b"), 2, "not layer numbers"),
        (("--id", "x", "--texts", "T", "--kind", "deep"), 2, "deep"),
        (("--id", "x", "--texts", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("--id", "../x", "--texts", "T"), 1, "not a valid id"),
        (("--id", "x", "--texts", "bad.jsonl"), 1, "bad.jsonl:2"),
        (("--id", "x", "--texts", "few.jsonl"), 1, "nothing left"),
    ],
)
def test_errors_come_before_the_model(args, code, said, trimtab, texts, tmp_path, monkeypatch):
    """Catches a mistake that is only found after a model was loaded for it."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("trimtab.steering.model.loading.load_model", load)
    monkeypatch.chdir(tmp_path)
    line = '{"text": "t", "label": "x"}'
    (tmp_path / "bad.jsonl").write_text(line + "\n{", encoding="utf-8")
    (tmp_path / "few.jsonl").write_text(line + "\n" + line.replace('"x"', '"y"'), encoding="utf-8")
    done = trimtab("classifiers", "train", *(texts if arg == "T" else arg for arg in args))
    assert done.code == code
    assert said in done.err
    assert "unexpectedly" not in done.err


def test_eval_refuses_before_the_model(trimtab, store, texts, monkeypatch):
    """Catches labels that a classifier cannot know, found out after a minute of reading."""
    monkeypatch.setattr("trimtab.steering.model.loading.load_model", None)
    store.put_classifier(classifier())
    for args, said in (
        (("eval", "tune", "--texts", texts), "Did you mean 'tone'"),
        (("eval", "tone", "--texts", texts), "does not know"),
    ):
        done = trimtab("classifiers", *args)
        assert done.code == 1
        assert said in done.err


def test_eval_refuses_another_models_classifier(trimtab, toy_folder, tmp_path):
    """Catches measures of a network on hidden states it was never trained on."""
    from trimtab.ui.stores import store_of

    store_of(str(toy_folder)).put_classifier(classifier())
    file = written(tmp_path / "t.jsonl", [{"text": "abc", "label": "casual"}])
    done = trimtab("classifiers", "eval", "tone", "--texts", file, "--model", str(toy_folder))
    assert done.code == 1
    assert "it was built for 'smollm2'" in done.err


def test_list_and_show(trimtab, store):
    """Catches a listing that hides a classifier, or a table without its doses."""
    assert "trimtab classifiers train" in trimtab("classifiers", "list").err
    store.put_classifier(classifier())
    store.put_classifier(classifier("mood", doses=()))
    done = trimtab("classifiers", "list")
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["mood", "tone"]
    assert "75%" in done.out
    listed = trimtab("classifiers", "list", "--json").json
    assert [card["id"] for card in listed["classifiers"]] == ["mood", "tone"]
    card = trimtab("classifiers", "show", "tone", "--json").json
    assert card == json.loads(json.dumps(classifier().card()))
    lines = trimtab("classifiers", "show", "tone").out.splitlines()
    rows = [line.split() for line in lines]
    assert ["1*", "12", "0.75", "0.7", "0.85", "0.04", "0.5"] in rows
    assert ["expert", "-", "1", "3", "0"] in rows
    assert ["expert", "-", "steps", "0.2"] in rows
    assert ["-", "casual", "steps", "0.2"] in rows
    bare = trimtab("classifiers", "show", "mood")
    assert "No calibrated doses" in bare.err


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"1": 3},
        {"one": SCORES},
        {"1": {**SCORES, "accuracy": "all"}},
        {"1": {**SCORES, "auroc": [1]}},
        {"1": {**SCORES, "confusion": [[1]]}},
        {"1": {"counts": 7}},
    ],
)
def test_measures_of_another_form(metrics, trimtab, store):
    """Catches a foreign file whose measures crash the command, or hide the other classifiers."""
    strange = replace(classifier(), metrics=metrics, data={"skipped": 3}, settings={"a": "b"})
    store.put_classifier(strange)
    assert trimtab("classifiers", "list").code == 0
    done = trimtab("classifiers", "show", "tone")
    assert done.code == 0, done.err
    assert "casual" in done.out


def test_export_import_and_delete(trimtab, store, tmp_path):
    """Catches a classifier that changes on its way through a file, or is overwritten unasked."""
    store.put_classifier(classifier())
    file = tmp_path / "out.safetensors"
    assert trimtab("classifiers", "export", "tone", str(file)).code == 0
    assert trimtab("classifiers", "export", "tone", str(file)).code == 1
    assert trimtab("classifiers", "export", "tone", str(tmp_path / "out.gguf")).code == 2
    assert from_bytes(file.read_bytes(), name="out").card() == classifier().card()
    assert trimtab("classifiers", "import", str(file)).code == 1  # the id is taken
    assert trimtab("classifiers", "import", str(file), "--id", "again").code == 0
    assert store.classifier("again").digest == classifier().digest
    assert trimtab("vectors", "import", str(file), "--id", "again").code == 1
    assert trimtab("classifiers", "delete", "again").code == 2  # nobody to ask
    assert trimtab("classifiers", "delete", "again", "--yes").code == 0
    assert trimtab("classifiers", "delete", "again", "--yes").code == 1
    assert [one.id for one in store.classifiers()] == ["tone"]


def test_a_torn_file_is_named_and_can_be_removed(trimtab, store):
    """Catches one damaged file that hides the others or cannot be deleted."""
    store.put_classifier(classifier())
    torn = store.folder / "classifiers" / "torn.safetensors"
    torn.write_bytes(to_bytes(classifier())[:100])
    done = trimtab("classifiers", "list")
    assert "tone" in done.out
    assert "torn.safetensors" in done.err
    assert trimtab("vectors", "list", "--json").json["problems"] == {}
    assert trimtab("classifiers", "delete", "torn", "--yes").code == 0
    assert trimtab("classifiers", "list", "--json").json["problems"] == {}


@pytest.mark.parametrize("name", HOSTILE)
def test_ids_cannot_leave_the_store(name, trimtab, store, tmp_path):
    """Catches a path in an id, typed or hidden in a file, that writes or removes elsewhere."""
    store.put_classifier(classifier())
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(to_bytes(classifier(name)))
    before = sorted(path for path in tmp_path.rglob("*"))
    for args in (
        ("import", str(file)),
        ("import", str(file), "--id", name or "../evil"),
        ("show", name),
        ("delete", name, "--yes"),
    ):
        done = trimtab("classifiers", *args)
        assert done.code == 1, args
        assert len(done.err.strip().splitlines()) == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before

"""Commands that load a model: on a toy in a folder, and the real one where that is the point."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from cli_program import PROGRAM, Done, program
from served_program import serving, started

from trimtab.steering.model.paths import data_home
from trimtab.steering.store import Store, model_folder

START = [sys.executable, "-P", "-c", PROGRAM]


def build(toy_folder, pairs_file, *more: str) -> Done:
    model = ("--model", str(toy_folder), "--dtype", "float32")
    return program("vectors", "build", "--pairs", str(pairs_file), *model, *more)


@pytest.fixture(scope="module")
def built(toy_folder, pairs_file, tmp_path_factory):
    """A home with one vector, `letters`, built by the command."""
    home = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(home))
        done = build(toy_folder, pairs_file)
        assert done.code == 0, done.err
    return home, done


def test_build_shows_its_stages_and_stores_the_vector(built, toy_folder):
    """Catches a build that says nothing for a minute, or stores under another name or model."""
    home, done = built
    assert done.out == ""
    assert [line for line in done.err.splitlines() if line.endswith(" ...")] == [
        f"Loading {toy_folder} ...",
        "Reading hidden states ...",
        "Choosing layers ...",
        "Measuring the curve ...",
    ]
    assert "Next: trimtab vectors show letters --model" in done.err
    vector = Store(model_folder(home, "toy")).vector("letters")
    assert vector.model.id == "toy"
    assert vector.calibration


def test_what_was_built_can_be_shown(built, toy_folder, trimtab, monkeypatch):
    """Catches a chart that cannot read what calibration writes."""
    monkeypatch.setenv("TRIMTAB_HOME", str(built[0]))
    done = trimtab("vectors", "show", "letters", "--model", str(toy_folder))
    assert done.code == 0, done.err
    assert "knee" in done.out


def test_uncalibrated(toy_folder, pairs_file, home):
    """Catches --no-calibrate, --id or --description being ignored."""
    done = build(
        toy_folder, pairs_file, "--no-calibrate", "--id", "raw", "--description", "letters"
    )
    assert done.code == 0, done.err
    vector = Store(model_folder(home, "toy")).vector("raw")
    assert vector.calibration is None
    assert vector.description == "letters"


def test_a_map_is_built_when_asked_for_and_shown(toy_folder, pairs_file, home, trimtab):
    """Catches --map being ignored, its stage unnamed, or a table that cannot read it."""
    done = build(toy_folder, pairs_file, "--map", "--id", "mapped")
    assert done.code == 0, done.err
    assert "Mapping layers and scales ..." in done.err
    found = Store(model_folder(home, "toy")).vector("mapped").calibration["map"]
    shown = trimtab("vectors", "show", "mapped", "--model", str(toy_folder))
    rows = shown.out.partition("Map on")[2].splitlines()[2:]
    assert len(rows) == len(found["layers"])
    assert all(len(row.split()) == 1 + 2 * len(found["scales"]) for row in rows)


def test_apply_prints_the_baseline_beside_each_scale(built, toy_folder, monkeypatch):
    """Catches an answer without its baseline, at another scale, or without its receipt."""
    monkeypatch.setenv("TRIMTAB_HOME", str(built[0]))
    args = ("-p", "Say 1", "--scale", "0", "--scale", "1", "--any-dose", "--max-tokens", "8")
    done = program("vectors", "apply", "letters", *args, "--model", str(toy_folder), "--json")
    assert done.code == 0, done.err
    plain, zero, one = done.json["answers"]
    assert [plain["scale"], zero["scale"], one["scale"]] == [None, 0.0, 1.0]
    assert zero["text"] == plain["text"]
    assert plain["receipt"] is None
    assert one["receipt"]["applied"][0]["id"] == "letters"


def test_chat_takes_piped_lines(built, toy_folder, monkeypatch):
    """Catches a chat that needs a terminal, or that prints its own chatter as an answer."""
    monkeypatch.setenv("TRIMTAB_HOME", str(built[0]))
    command = [*START, "chat", str(toy_folder), "--max-tokens", "4", "--dtype", "float32"]
    lines = "Say 1\n/steer 0.1 letters\nSay 2\n/off\n/quit\nnever\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Steering: +0.1 letters at layer" in done.stderr
    assert "Steering is off." in done.stderr
    assert done.stdout.count("\n") >= 2


def test_chat_stops_where_it_cannot_steer(built, toy_folder, monkeypatch):
    """Catches a script that goes on unsteered after a mistyped vector."""
    monkeypatch.setenv("TRIMTAB_HOME", str(built[0]))
    command = [*START, "chat", str(toy_folder), "--max-tokens", "4"]
    lines = "/steer 1.0 lettres\nSay 2\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Did you mean 'letters'?" in done.stderr


def test_bench_measures_every_arm(toy_folder, home):
    """Catches an arm without a number."""
    args = ("--concurrency", "1,2", "--tokens", "4", "--repeats", "1", "--dtype", "float32")
    done = program("bench", str(toy_folder), *args, "--json")
    assert done.code == 0, done.err
    rows = done.json["tokens_per_second"]
    assert [row["concurrency"] for row in rows] == [1, 2]
    for row in rows:
        assert all(row[arm] > 0 for arm in ("unsteered", "idle", "alike", "different"))


def test_a_model_that_is_not_there(home):
    """Catches a traceback for a folder without a model."""
    for command in (("serve", "./nowhere", "--port", "0"), ("bench", ".")):
        done = program(*command)
        assert done.code == 1, command
        assert done.err.strip().splitlines()[-1].startswith("Error: The")
        assert "Traceback" not in done.err


@pytest.mark.parametrize("stage", ["Loading", "Choosing layers", "Measuring the curve"])
def test_killed_while_building_leaves_the_store_whole(stage, built, toy_folder, pairs_file):
    """Catches a half-written vector that a kill leaves behind, or a lock that blocks the next."""
    home, _ = built
    command = [*START, "vectors", "build", "--pairs", str(pairs_file), "--id", "second"]
    env = {**os.environ, "TRIMTAB_HOME": str(home)}
    with subprocess.Popen(
        [*command, "--model", str(toy_folder)], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                break
        process.send_signal(signal.SIGKILL)
    done = program("vectors", "list", "--json", TRIMTAB_HOME=str(home))
    assert done.code == 0
    assert done.json["problems"] == {}
    assert [card["id"] for card in done.json["vectors"]] == ["letters"]


def test_doctor(home):
    """Catches a check that cannot run, or an installation that steers wrongly."""
    done = program("doctor", "--json")
    assert done.code == 0, done.out
    findings = {finding["name"]: finding for finding in done.json["findings"]}
    assert findings["steering"]["status"] == "ok"
    assert {"python", "torch", "device", "memory", "model cache", "store"} <= set(findings)


def test_doctor_names_what_is_broken(home):
    """Catches a doctor who finds everybody healthy, or names an illness without a cure."""
    folder = home / "models" / "smollm2" / "vectors"
    folder.mkdir(parents=True)
    (folder / "torn.safetensors").write_bytes(b"torn")
    done = program("doctor", "--json")
    assert done.code == 1
    (broken,) = [f for f in done.json["findings"] if f["status"] == "broken"]
    assert "torn.safetensors" in broken["detail"]
    assert "rm " in broken["mend"]


def test_serve_answers_its_own_curl_line_and_stops(built, toy_folder, monkeypatch):
    """Catches a start-up line that does not work when pasted, and a traceback after Ctrl-C."""
    monkeypatch.setenv("TRIMTAB_HOME", str(built[0]))
    with serving(str(toy_folder), "--dtype", "float32", "--any-dose") as served:
        command = served.line("curl ").strip()
        assert '"steering": "1.0 letters"' in command
        curl = subprocess.run(
            ["bash", "-c", f"{command} -s"], capture_output=True, text=True, timeout=60
        )
        assert json.loads(curl.stdout)["steering"]["applied"][0]["id"] == "letters"
        assert served.line("  device")
    assert served.lines[-1] == "Stopped.\n"


def test_serve_guards_with_keys_from_the_environment(toy_folder, home, monkeypatch):
    """Catches keys that are read and not enforced, or printed."""
    monkeypatch.setenv("TRIMTAB_API_KEYS", "first-secret, second-secret")
    with serving(str(toy_folder)) as served:
        request = urllib.request.Request(f"{served.url}/v1/models")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
        request.add_header("authorization", "Bearer second-secret")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
    assert "secret" not in served.log


def test_ctrl_c_while_loading(toy_folder, home):
    """Catches a server that cannot be stopped until its model is loaded."""
    with started("serve", str(toy_folder), codes=(0, 130)) as served:
        served.line("Loading")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it builds a vector: 90 s on two quiet cores, minutes on busy ones
def test_demo_ends_and_steers(tmp_path_factory):
    """Catches the first thing anybody tries: that it ends, steers both ways, and is quick again."""
    home = str(tmp_path_factory.mktemp("demo"))
    first = program("demo", TRIMTAB_HOME=home)
    assert first.code == 0, first.err
    again = program("demo", TRIMTAB_HOME=home)
    assert again.code == 0, again.err
    assert "Building" in first.err
    assert "Building" not in again.err
    for done in (first, again):
        heads = re.split(r"\n(?:unsteered|[+-]1 \w+)\n", done.out)
        texts = [text.partition("\n[")[0].strip() for text in heads[1:]]
        assert len(set(texts)) == 3, done.out
        assert all(texts)
        assert done.out.count("at layer") == 2
        assert "First token after" in done.err
        assert "Next: trimtab" in done.err


@pytest.mark.slow
def test_apply_on_the_real_model(tmp_path_factory, monkeypatch):
    """Catches a vector that does nothing to the real model's text."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path_factory.mktemp("apply")))
    done = program("vectors", "build", "--concept", "optimistic", "--no-calibrate")
    assert done.code == 0, done.err
    done = program("vectors", "apply", "optimistic", "-p", "Describe tomorrow.", "--json")
    assert done.code == 0, done.err
    assert len({answer["text"] for answer in done.json["answers"]}) == 3
    assert data_home().is_dir()

"""`trimtab quantize`: what it says, what it refuses, and that it survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cli_program import PROGRAM

from trimtab.steering.model.loading import load_model
from trimtab.ui.stores import store_of

TEXT = "A short text of letters that the toy knows. " * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def arguments(toy_folder, text_file, target, *more: str) -> list[str]:
    options = ["--calibration", str(text_file), "--rows", "8", "--tokens", "32", "--dtype"]
    return ["quantize", str(toy_folder), "--out", str(target), *options, "float32", *more]


def test_quantize_says_what_came_of_it_and_what_to_do_next(
    toy_folder, text_file, tmp_path, trimtab
):
    """Catches a command that ends without the folder, the figures or the next command."""
    target = tmp_path / "made"
    done = trimtab(*arguments(toy_folder, text_file, target))
    assert done.code == 0, done.err
    assert "bits a weight" in done.out
    assert "nats a token) on 8 rows of text.txt, those left out" in done.out
    assert done.err.splitlines()[-1] == f"Next: trimtab serve {target}"
    assert load_model(str(target), device="cpu", dtype="float32").model is not None
    # Vectors of the original are there when the quantised model is served.
    assert store_of(str(target)).folder == store_of(str(toy_folder)).folder


def test_json_holds_every_linear(toy_folder, text_file, tmp_path, trimtab):
    """Catches progress on stdout, and a report that a program cannot read."""
    target = tmp_path / "made"
    more = ("--json", "--scheme", "w4a8", "--method", "rtn", "--keep", "down_proj=fp8")
    done = trimtab(*arguments(toy_folder, text_file, target, *more))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["scheme"] == "w4a8"
    assert {linear["format"] for linear in report["linears"]} == {"fp8", "nvfp4"}
    assert report["bytes_after"] == sum(p.stat().st_size for p in target.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--keep", "down_proj"), "is not PATTERN=fp8"),
        (("--keep", "down_proj=int3"), "down_proj=int3"),
        (("--scheme", "int4", "--method", "zeroquant-fp"), "int4 has none"),
        (("--measure", "nowhere.txt"), "There is no file 'nowhere.txt'"),
        (("--group-size", "24"), "no groups of 24"),
    ],
)
def test_refused_before_the_model_is_loaded(
    more, message, toy_folder, text_file, tmp_path, trimtab
):
    """Catches a mistake that is told after minutes of loading."""
    done = trimtab(*arguments(toy_folder, text_file, tmp_path / "made", *more))
    assert done.code in (1, 2)
    assert message in done.err
    assert "Loading" not in done.err


def test_an_existing_folder_is_left_alone(toy_folder, text_file, tmp_path, trimtab):
    """Catches a result that replaces what the user had."""
    done = trimtab(*arguments(toy_folder, text_file, tmp_path))
    assert done.code == 1
    assert "exists already" in done.err


def test_killed_and_started_again(toy_folder, text_file, tmp_path, trimtab):
    """Catches a run that kill -9 leaves unable to go on, or a half model under the real name."""
    target = tmp_path / "made"
    progress = tmp_path / "made.progress"
    command = arguments(toy_folder, text_file, target)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, *command],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (progress / "calibration.safetensors").is_file():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        os.sched_yield()
    killed.send_signal(signal.SIGSTOP)  # it holds the folder, and does nothing more to it
    assert not target.exists()
    busy = trimtab(*command)
    assert busy.code == 1
    assert "Another process is quantising" in busy.err
    killed.kill()
    killed.wait()
    other = trimtab(*command, "--method", "mse")
    assert other.code == 1
    assert "method was 'gptq', now 'mse'" in other.err
    done = trimtab(*command)
    assert done.code == 0, done.err
    assert not progress.exists()
    assert load_model(str(target), device="cpu", dtype="float32").model is not None

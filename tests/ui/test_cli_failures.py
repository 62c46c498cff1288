"""How commands fail: the right code, one paragraph on stderr, a way out in it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from cli_program import PROGRAM, program, vector

USAGE = [
    ("nonsense",),
    ("vectors", "lst"),
    ("vectors", "show"),
    ("vectors", "list", "--nope"),
    ("vectors", "build"),
    ("vectors", "build", "--concept", "honest", "--pairs", "x.jsonl"),
    ("vectors", "build", "--describe", "warm"),
    ("vectors", "build", "--describe", "warm", "--against", "cold"),
    ("vectors", "build", "--concept", "honest", "--option", "c"),
    ("vectors", "build", "--concept", "honest", "--no-calibrate", "--map"),
    ("vectors", "compare", "--layer", "one"),
    ("vectors", "export", "warm", "warm.pkl"),
    ("vectors", "delete", "warm"),
    ("bench", "--concurrency", "1,many"),
    ("bench", "--concurrency", "0"),
    ("serve", "--port", "70000"),
    ("serve", "--host", "0.0.0.0"),
    ("serve", "--api-key", "short"),
    ("serve", "--any-dose", "--max-dose", "2"),
    ("chat", "smollm2", "--url", "http://127.0.0.1:1"),
]
FAILED = [
    ("vectors", "show", "nix"),
    ("vectors", "apply", "nix", "-p", "Hi"),
    ("vectors", "export", "nix", "nix.gguf"),
    ("vectors", "import", "/nowhere/at.all"),
    ("vectors", "build", "--concept", "onest"),
    ("vectors", "build", "--pairs", "/nowhere/at.all"),
    ("vectors", "build", "--concept", "honest", "--method", "magic"),
    ("vectors", "build", "--concept", "honest", "--option", "c=1"),
    ("vectors", "build", "--concept", "honest", "--position", "middle"),
    ("vectors", "compare", "warm", "nix"),
    ("vectors", "compare", "warm", "warm"),
    ("vectors", "compare", "--layer", "7"),
    ("presets", "show", "nix"),
    ("presets", "save", "sunny", "1.0 nix"),
    ("presets", "save", "sunny", "1.0 +"),
    ("presets", "delete", "nix"),
    ("chat", "--url", "http://127.0.0.1:9"),
    ("chat", "--url", "ftp://127.0.0.1"),
]


@pytest.fixture(autouse=True)
def one_vector(store):
    store.put_vector(vector())


@pytest.mark.parametrize(
    ("args", "code"), [(a, 2) for a in USAGE] + [(a, 1) for a in FAILED], ids=str
)
def test_failure_is_one_paragraph_with_its_code(args, code, trimtab, tmp_path, monkeypatch):
    """Catches a traceback, a wrong exit code, and output that a script takes for a result."""
    monkeypatch.chdir(tmp_path)
    done = trimtab(*args)
    assert done.code == code, done.err
    assert done.out == ""
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(trimtab, monkeypatch):
    """Catches a failure that cannot be looked into."""
    assert "Traceback" not in trimtab("vectors", "show", "nix").err
    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    done = trimtab("vectors", "show", "nix")
    assert "Traceback (most recent call last)" in done.err
    assert done.err.strip().splitlines()[-1].startswith("Error: Unknown vector 'nix'.")
    assert done.code == 1


def test_a_fault_of_our_own_is_a_paragraph_too(trimtab, monkeypatch):
    """Catches an unexpected exception that reaches the user as a traceback."""
    monkeypatch.setattr("trimtab.ui.commands.artifact_files.all_stores", lambda: 1 / 0)
    done = trimtab("vectors", "list")
    assert done.code == 1
    assert done.err.startswith("Error: trimtab failed unexpectedly: ZeroDivisionError")
    assert "TRIMTAB_DEBUG=1" in done.err


def test_usage_errors_name_the_nearest_command(trimtab):
    """Catches a typo that is answered without a hint."""
    assert "Did you mean 'list'?" in trimtab("vectors", "lst").err
    assert "Did you mean 'honest'?" in trimtab("vectors", "build", "--concept", "onest").err


def test_a_short_key_is_refused_without_being_printed(trimtab):
    """Catches a key that lands in a log by way of an error message."""
    done = trimtab("serve", "--api-key", "s3cret")
    assert done.code == 2
    assert "s3cret" not in done.err


def test_a_taken_port_is_said_before_a_model_is_loaded(trimtab):
    """Catches five seconds of loading, and a traceback, for a port that is in use."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = trimtab("serve", "--port", str(taken.getsockname()[1]))
    assert done.code == 1
    assert "is taken by another program" in done.err
    assert "Loading" not in done.err


def test_a_reader_that_has_enough_is_no_failure_to_complain_about(home):
    """Catches a BrokenPipeError's traceback from `trimtab vectors list | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-P", "-c", PROGRAM, "vectors", "list", "--json"]
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(home, environment, is_coloured):
    """Catches escape codes on a terminal whose owner asked for none."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-P", "-c", PROGRAM, "vectors", "list"]
    subprocess.run(command, stdout=theirs, stderr=theirs, env=env, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass  # how Linux says that a terminal's other side is closed
    os.close(ours)
    assert b"warm" in shown
    assert (b"\x1b[" in shown) == is_coloured


def test_pipes_get_no_colour(home):
    """Catches escape codes in a file."""
    done = program("vectors", "list", TERM="xterm")
    assert "\x1b" not in done.out + done.err

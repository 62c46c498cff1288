"""`trimtab attribute`: on a toy in a folder, and the real model where that is the point."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest
import torch
from cli_program import PROGRAM, Done
from toy_chat import toy_chat
from toys import TOYS

from trimtab.attribution.attribute import attribute
from trimtab.attribution.baselines import BASELINES
from trimtab.attribution.methods.registry import METHODS, WITHOUT_GRADIENTS
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import prompt_from_messages, prompt_from_text
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.paths import data_home
from trimtab.steering.model.profile import profile_model
from trimtab.steering.store import Store, model_folder
from trimtab.steering.vector import VectorArtifact
from trimtab.training.scoring import generate
from trimtab.training.steered_model import SteeredModel
from trimtab.ui.cli import run
from trimtab.ui.commands import attribute as command

QUESTION = ("attribute", "Say abc", "--target", "ab")
ESCAPES = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(autouse=True)
def loud_start(monkeypatch):
    """Leave this process' loggers and warnings as they are."""
    monkeypatch.setattr("trimtab.ui.server_log.quiet_start", lambda: None)


@pytest.fixture(scope="module")
def toy(toy_folder):
    """The toy as the command loads it, and its profile."""
    loaded = load_model(str(toy_folder), device="cpu", dtype="float32")
    return loaded, profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)


@pytest.fixture
def ask(trimtab, toy_folder) -> Callable[..., Done]:
    """Run the command on the toy."""

    def run(*args: str) -> Done:
        return trimtab(*args, "--model", str(toy_folder))

    return run


@pytest.fixture
def pushing(home, toy) -> Store:
    """The toy's store, with a vector `push` in it."""
    _, profile = toy
    store = Store(model_folder(data_home(), "toy"))
    rows = torch.randn(2, profile.ref.hidden_size, generator=torch.Generator().manual_seed(0))
    store.put_vector(
        VectorArtifact(
            id="push",
            model=profile.ref,
            layers=(0, 1),
            directions=rows / rows.norm(dim=1, keepdim=True) * profile.hidden_norms.unsqueeze(1),
            default_layers=(0, 1),
            method="mean_difference",
        )
    )
    return store


def said_by_python(toy, prompt, objective, **how):
    result = attribute(Subject(*toy), prompt, objective, **how).to_dict()
    return untimed(json.loads(json.dumps(result)))


def untimed(result):
    assert result["usage"].pop("ms") > 0
    return result


def piped(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_json_is_what_python_says(ask, toy):
    """Catches options that are read and not passed on, and JSON of another shape."""
    tokenizer = toy[0].tokenizer
    how = ("--method", "ig", "--set", "points=5", "--set", "correct=false", "--baseline", "mean")
    done = ask(*QUESTION, *how, "--normalize-length", "--json")
    assert done.code == 0, done.err
    expected = said_by_python(
        toy,
        prompt_from_messages(tokenizer, [{"role": "user", "content": "Say abc"}]),
        Objective(tuple(tokenizer("ab")["input_ids"]), is_normalized=True),
        method="integrated_gradients",
        options={"points": 5, "correct": False},
        baseline="mean",
    )
    assert untimed(done.json) == expected


def test_two_answers_of_a_raw_prompt(ask, toy):
    """Catches answers in the wrong order, and a template where none was asked for."""
    tokenizer = toy[0].tokenizer
    done = ask("attribute", "abc", "--raw", "--preferred", "d", "--dispreferred", "ee", "--json")
    assert done.code == 0, done.err
    objective = Objective(*(tuple(tokenizer(text)["input_ids"]) for text in ("d", "ee")))
    assert untimed(done.json) == said_by_python(toy, prompt_from_text(tokenizer, "abc"), objective)


@pytest.mark.parametrize("against", [(), ("--dispreferred", "no")])
def test_without_an_answer_the_model_gives_its_own(against, ask, toy):
    """Catches another answer than the model's likeliest, or one of another length."""
    loaded, profile = toy
    done = ask("attribute", "Say abc", "--max-tokens", "3", *against, "--json")
    assert done.code == 0, done.err
    prompt = prompt_from_messages(loaded.tokenizer, [{"role": "user", "content": "Say abc"}])
    (own,) = generate(SteeredModel(loaded, profile), [prompt.ids], 3)
    names = {"target"} if not against else {"preferred"}
    assert [t["token_id"] for t in done.json["output"] if t["answer"] in names] == list(own.ids)
    assert "Answering ..." in done.err
    shown = ask("attribute", "Say abc", "--max-tokens", "3", *against)
    assert "The model's own answer:" in shown.out


def test_messages_and_stdin_ask_the_same(ask, tmp_path, monkeypatch):
    """Catches a prompt that depends on the way it came in."""
    expected = untimed(ask(*QUESTION, "--json").json)
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "Say abc"}]))
    rest = ("--target", "ab", "--json")
    assert untimed(ask("attribute", "--messages", str(file), *rest).json) == expected
    piped(monkeypatch, file.read_bytes())
    assert untimed(ask("attribute", "--messages", "-", *rest).json) == expected
    piped(monkeypatch, b"Say abc\n")
    assert untimed(ask("attribute", "-", *rest).json) == expected


def test_steering_is_in_question_too(ask, toy, pushing):
    """Catches an attribution of the unsteered model where the steered one was asked for."""
    plain = untimed(ask(*QUESTION, "--json").json)
    zero = untimed(ask(*QUESTION, "--steer", "0 push", "--json").json)
    assert zero["input"] == plain["input"]
    pushed = ask(*QUESTION, "--steer", "0.5 push", "--json")
    assert pushed.code == 0, pushed.err
    assert pushed.json["steering"]["applied"][0]["id"] == "push"
    assert "steering" not in plain
    assert pushed.json["objective"]["value"] != plain["objective"]["value"]
    shown = ask(*QUESTION, "--steer", "0.5 push")
    assert "Steered: +0.5 push at layers 0-1" in shown.out
    assert ask(*QUESTION, "--steer", "9 push").code == 1
    assert ask(*QUESTION, "--steer", "9 push", "--any-dose").code == 0


def test_table_names_every_word_once(ask):
    """Catches a word that is missing, a bar on the wrong side, or escape codes in a pipe."""
    done = ask(*QUESTION)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    rows = [line for line in done.out.splitlines() if "|" in line and "█" in line]
    scores = {t["index"]: t["score"] for t in ask(*QUESTION, "--json").json["input"]}
    for row in rows:
        index, score = row.split()[:2]
        assert float(score) == pytest.approx(scores[int(index)], abs=5e-4)
        assert ("█|" in row) == (float(score) < 0)
    sizes = [abs(float(row.split()[1])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for said in ("F = log P(answer)", "baseline zero", "promises no sum", "gradient"):
        assert said in " ".join(done.out.split())
    assert done.err.count("Next: trimtab attribute 'Say abc' --target ab") == 1


def on_terminal(*args: str, **environment: str) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    env = {**os.environ, "TERM": "xterm", **environment}
    env = {name: value for name, value in env.items() if value}
    command = [sys.executable, "-P", "-c", PROGRAM, *args]
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass  # how Linux says that a terminal's other side is closed
    os.close(ours)
    return shown.decode()


def test_terminal_gets_colours_and_a_bar(home, toy_folder):
    """Catches a terminal without colours, or without a sign of how long it will take."""
    shown = on_terminal(*QUESTION, "--model", str(toy_folder), COLORTERM="truecolor", NO_COLOR="")
    assert "\x1b[38;2;255;255;255;48;2;" in shown
    assert "Say abc" in ESCAPES.sub("", shown)
    assert "Attributing: 100%" in shown


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_gets_the_table(no_color, home, toy_folder, monkeypatch):
    """Catches escape codes on a terminal whose owner asked for none."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    assert run([*QUESTION, "--model", str(toy_folder)]) == 0
    assert ("\x1b[" in screen.getvalue()) != bool(no_color)
    assert ("against|for" in screen.getvalue()) == bool(no_color)


def test_a_narrow_encoding_gets_codes(home, toy_folder, monkeypatch):
    """Catches a crash where the output has no letters for the bar, the arrow or the prompt."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    model = ("--model", str(toy_folder))
    assert run(["attribute", "é\n日", "--target", "ß\u202e", *model]) == 0
    narrow.seek(0)
    shown = narrow.read()
    assert "#" in shown
    assert "Answer: \\xdf" in shown
    assert "'\\u65e5'" in shown


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_ctrl_c_leaves_no_traceback(home, toy_folder):
    """Catches an attribution that cannot be stopped, or that ends in a traceback."""
    long = ("--method", "ig", "--set", "points=1024", "--model", str(toy_folder))
    args = [sys.executable, "-P", "-c", PROGRAM, *QUESTION, *long]
    with subprocess.Popen(
        args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Attributing"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Stopped."
    assert "Traceback" not in err


def test_page_is_written_whole_and_once(ask, tmp_path):
    """Catches a page over another file, or one of another attribution."""
    file = tmp_path / "page.html"
    args = ("attribute", "Say <script>x</script>", "--target", "ab", "--html", str(file))
    done = ask(*args, "--json")
    assert done.code == 0, done.err
    page = file.read_text(encoding="utf-8")
    assert "<script" not in page
    scores = [token["score"] for token in done.json["input"] if token["score"] is not None]
    assert [float(x) for x in re.findall(r", text, ([+-][0-9.]+)\"", page)] == scores
    again = ask(*args)
    assert again.code == 1
    assert "--overwrite" in again.err
    assert "Loading" not in again.err
    assert ask(*args, "--overwrite").code == 0
    assert [path.name for path in tmp_path.glob("*.html")] == ["page.html"]


USAGE = [
    ((), "--messages"),
    (("Hi", "--messages", "x.json"), "--messages"),
    (("",), "is empty"),
    (("Hi", "--target", " "), "--target is empty"),
    (("Hi", "--preferred", "a"), "--dispreferred"),
    (("Hi", "--target", "a", "--dispreferred", "b"), "--preferred"),
    (("Hi", "--target", "a", "--max-tokens", "3"), "--max-tokens"),
    (("--raw", "--messages", "x.json"), "--raw"),
    (("Hi", "--set", "points=3"), "--method"),
    (("Hi", "--method", "ig", "--set", "points"), "KEY=VALUE"),
    (("Hi", "--baseline", "nought"), "'zero'"),
]
FAILED = [
    (("Hi", "--method", "attnlpr"), "Did you mean 'attnlrp'?"),
    (("Hi", "--method", "ig", "--set", "point=3"), "Did you mean 'points'?"),
    (("Hi", "--method", "ig", "--set", "points=many"), "expected int"),
    (("Hi", "--steer", "1.0 nix"), "Unknown vector 'nix'"),
    (("Hi", "--steer", "1.0 +"), "--steer"),
    (("Hi", "--html", "/nowhere/at/all.html"), "folder is missing"),
    (("Hi \ud800",), "UTF-8"),
    (("--messages", "/nowhere/at.all"), '"role"'),
]
FAILED_LATER = [
    (("Hi", "--preferred", "a", "--dispreferred", "a"), "no difference to explain"),
    (("Hi", "--target", "a", "--baseline", "drop"), "'zero', 'pad' or 'mean'"),
    (("a" * 600, "--target", "a"), "512"),
    (("a" * 600,), "shorten it"),
]


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [(args, 2, hint) for args, hint in USAGE] + [(args, 1, hint) for args, hint in FAILED],
    ids=repr,
)
def test_failure_comes_before_the_model_and_says_what_to_do(args, code, hint, ask):
    """Catches five seconds of loading, or a traceback, for a command that cannot work."""
    done = ask("attribute", *args)
    assert (done.code, done.out) == (code, "")
    (line,) = done.err.strip().splitlines()
    assert line.startswith("Error: ")
    assert hint in line


@pytest.mark.parametrize(("args", "hint"), FAILED_LATER, ids=lambda x: str(x)[:40])
def test_what_only_the_model_can_refuse(args, hint, ask):
    """Catches a question without an answer that is answered all the same."""
    done = ask("attribute", *args)
    assert (done.code, done.out) == (1, "")
    lines = [line for line in done.err.strip().splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert hint in lines[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'["a"]', b'[{"role": "user"}]', b'{"role": "user"}',
     b'[{"role": "user", "content": [{"type": "text", "text": "a"}]}]',
     b'[{"role": "user", "content": "a", "name": "b"}]',
     b'[{"role": "user", "content": "\\ud800"}]'],
)  # fmt: skip
def test_messages_of_another_shape(content, ask, tmp_path):
    """Catches a field that is dropped, or a traceback for a file that is something else."""
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    done = ask("attribute", "--messages", str(file))
    assert done.code == 1
    assert str(file) in done.err
    assert "failed unexpectedly" not in done.err


def test_a_pipe_that_never_ends(ask, monkeypatch):
    """Catches a prompt that is read for ever."""
    with open("/dev/zero", "rb") as zeros:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
        done = ask("attribute", "-")
    assert done.code == 1
    assert "16 MiB" in done.err


def test_choices_are_what_there_is():
    """Catches a baseline or a method that the command names and attribution does not have."""
    assert set(command.BASELINES) == set(BASELINES)
    assert set(command.OTHERS) <= set(METHODS)


@pytest.mark.slow
def test_the_real_model_was_asked_about_france(trimtab, smollm2, monkeypatch):
    """Catches scores that are filed under other words than the ones that matter."""
    monkeypatch.setattr("trimtab.ui.attributed_model.load_model", lambda *a, **k: smollm2)
    question = ("attribute", "What is the capital of France?")
    done = trimtab(*question, "--preferred", "Paris.", "--dispreferred", "London.", "--json")
    assert done.code == 0, done.err
    scores = {token["token"]: token["score"] for token in done.json["input"] if token["score"]}
    assert max(scores, key=scores.get) == " France"
    own = trimtab(*question)
    assert own.code == 0, own.err
    assert "Paris" in own.out.splitlines()[0]
    assert "' capital'" in own.out


def saved(folder, toy):
    toy.model.save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_without_rules_gets_another_method(trimtab, tmp_path):
    """Catches a default that cannot be used on the model at hand."""
    model = saved(tmp_path / "mixtral", toy_chat(TOYS["mixtral"]()))
    done = trimtab(*QUESTION, "--model", model, "--json")
    assert done.code == 0, done.err
    assert done.json["method"] == WITHOUT_GRADIENTS
    refused = trimtab(*QUESTION, "--model", model, "--method", "attnlrp")
    assert refused.code == 1
    assert "has no rules for 'mixtral'" in refused.err


def test_a_model_without_a_template_reads_raw_prompts(trimtab, tmp_path):
    """Catches a prompt that is silently read without the template that was meant."""
    toy = toy_chat()
    toy.tokenizer.chat_template = None
    model = saved(tmp_path / "plain", toy)
    refused = trimtab(*QUESTION, "--model", model)
    assert refused.code == 1
    assert "--raw" in refused.err
    done = trimtab(*QUESTION, "--raw", "--model", model, "--json")
    assert done.code == 0, done.err
    assert all(token["kind"] == "text" for token in done.json["input"])

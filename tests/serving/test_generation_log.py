"""The generation log: what was asked and answered, all of it or none, and never at a cost."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading

import pytest
from serving_fakes import LETTERS, TOKENIZER, FakeEngine

from trimtab.serving.settings import ServerSettings
from trimtab.steering.errors import TrimtabError

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé\u2028llo"}]
NOT_LOGGED = "trimtab_generations_not_logged_total"


def lines(path) -> list[dict]:
    # By line feeds only: a text may hold other separators.
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "generations.jsonl"


@pytest.fixture
def logged(serve, file):
    """Start a server with a log, and return how to read it once it has so many lines."""

    def start(**options):
        served = serve(log_generations=file, **options)

        def read(count: int) -> list[dict]:
            served.until(lambda: served.metric("trimtab_generations_logged_total") >= count)
            found = lines(file)
            assert len(found) == count
            return found

        return served, read

    return start


def streamed_text(answer) -> str:
    events = [x.removeprefix("data: ") for x in answer.text.splitlines() if x]
    assert events[-1] == "[DONE]"
    choices = [c for x in events[:-1] for c in json.loads(x)["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices)


def test_a_line_tells_who_asked_what_and_what_came(logged):
    """A log that a classifier cannot be trained on: no text, no labels, no steering."""
    served, read = logged()
    asked = {"messages": TURNS, "metadata": {"tone": "concise", "user": "7"}}
    answer = served.chat(**asked, steering="0.5 kind").json()
    (line,) = read(1)
    receipt = answer["steering"]
    assert line == {
        "id": answer["id"],
        "created": answer["created"],
        "model": "toy",
        "index": 0,
        "messages": TURNS,
        "metadata": {"tone": "concise", "user": "7"},
        "steering": {"fingerprint": receipt["fingerprint"], "applied": receipt["applied"]},
        "text": answer["choices"][0]["message"]["content"],
        "finish_reason": "length",
    }
    assert receipt["applied"][0]["id"] == "kind"
    served.chat()
    _, plain = read(2)
    assert (plain["metadata"], plain["steering"]) == (None, None)


def test_streamed_equals_whole(logged):
    """A log that knows only one of the two ways to answer, or half of a stream's text."""
    served, read = logged()
    served.chat(messages=TURNS, stop=["m"])
    streamed = served.chat(messages=TURNS, stop=["m"], stream=True)
    whole, again = read(2)
    assert again["text"] == whole["text"] == streamed_text(streamed)
    assert {**again, "id": "", "created": 0} == {**whole, "id": "", "created": 0}
    assert again["id"] != whole["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_a_line(logged, stream):
    """Only the first of several choices, or the texts of two mixed into one."""
    served, read = logged()
    answer = served.chat(n=2, temperature=1, seed=3, stream=stream)
    found = read(2)
    assert [line["index"] for line in found] == [0, 1]
    assert len({line["id"] for line in found}) == 1
    assert found[0]["text"] != found[1]["text"]
    if not stream:
        texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
        assert [line["text"] for line in found] == texts


def test_completions_have_their_prompts(logged):
    """A prompt sent as ids that nobody can read, or a text with the echo in it."""
    served, read = logged()
    answer = served.complete(prompt=["Once", "Twice"], n=2)
    texts = [choice["text"] for choice in answer.json()["choices"]]
    found = read(4)
    assert [line["prompt"] for line in found] == ["Once", "Once", "Twice", "Twice"]
    assert [line["text"] for line in found] == texts
    served.complete(prompt=LETTERS[:3], echo=True)
    last = read(5)[-1]
    assert last["prompt"] == TOKENIZER.decode(LETTERS[:3])
    assert len(last["text"]) == 8
    assert "messages" not in last


def test_the_log_does_not_change_the_answer(serve, logged):
    """Prompts kept for the log that turn up as an echo."""
    served, _ = logged()
    kept = served.complete(logprobs=2, steering="0.5 kind").json()
    without = serve().complete(logprobs=2, steering="0.5 kind").json()
    assert kept["choices"] == without["choices"]


def test_nothing_is_written_without_the_flag(serve, tmp_path):
    """People's words on a disk that nobody asked to keep them."""
    served = serve()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert served.chat(metadata={"a": "b"}).status_code == 200
    assert served.chat(stream=True).status_code == 200
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert served.app.state.server.generation_log is None
    assert ServerSettings().log_generations is None


def test_the_file_is_the_owners_alone_and_is_added_to(logged, file):
    """Prompts that every user of the machine can read, or a restart that loses yesterday's."""
    served, read = logged()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    served.chat()
    (first,) = read(1)
    served.server.should_exit = True
    with file.open("ab") as torn:
        torn.write(b'{"id": "cut by a ki')
    again, _ = logged()
    again.chat()
    again.until(lambda: again.metric("trimtab_generations_logged_total") == 1)
    parts = file.read_bytes().split(b"\n")
    assert len(parts) == 4
    assert json.loads(parts[0]) == first
    assert json.loads(parts[2])["text"] == first["text"]


def test_a_cancelled_or_failed_request_is_not_logged(logged, file):
    """Half an answer that a classifier takes for a whole one."""
    served, read = logged(engine=FakeEngine(delay_s=0.02))
    with served.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "toy", "messages": TURNS, "max_tokens": 200, "stream": True, "n": 2},
    ) as answer:
        next(answer.iter_lines())
    served.until(lambda: len(served.engine.cancelled) == 2)
    served.engine.fail_at = 3
    assert served.chat().status_code == 500
    served.engine.fail_at = None
    served.engine.delay_s = 0.0
    served.chat(metadata={"is": "whole"})
    assert read(1)[0]["metadata"] == {"is": "whole"}


def test_at_its_limit_it_stops_for_good_and_says_so_once(logged, file, caplog):
    """A log that fills the disk, one that keeps only what is short, or that ends in silence."""
    served, read = logged(log_generations_max_bytes=1024)
    with caplog.at_level(logging.WARNING, logger="trimtab.serving"):
        served.chat()
        read(1)
        assert served.chat(metadata={"long": "x" * 500, "more": "x" * 500}).status_code == 200
        assert served.chat().status_code == 200
        served.until(lambda: served.metric(NOT_LOGGED) == 2)
    assert file.stat().st_size <= 1024
    assert len(lines(file)) == 1
    said = [r.getMessage() for r in caplog.records if "not logged" in r.getMessage()]
    assert len(said) == 1
    assert str(file) in said[0]
    assert "limit of 1024 bytes" in said[0]
    assert f'{NOT_LOGGED}{{reason="limit"}} 2.0' in served.http.get("/metrics").text


def test_a_full_disk_costs_no_request_and_is_said_once(logged, file, caplog, monkeypatch):
    """An error of the disk that becomes the client's, or half a line glued to the next."""
    served, _ = logged()
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) > 10 and data.startswith(b'{"id"'):
            return write(handle, data[:10])
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING, logger="trimtab.serving"):
        with monkeypatch.context() as patch:
            patch.setattr("trimtab.serving.generation_log.os.write", full)
            for _ in range(2):
                assert served.chat().status_code == 200
            served.until(lambda: served.metric(NOT_LOGGED) == 2)
        said = [r.getMessage() for r in caplog.records if "not logged" in r.getMessage()]
        assert len(said) == 1
        assert "No space left on device" in said[0]
        served.chat(metadata={"after": "it"})
        served.until(lambda: served.metric("trimtab_generations_logged_total") == 1)
    parts = file.read_bytes().split(b"\n")
    assert [len(part) for part in parts[:-2]] == [10]
    assert json.loads(parts[-2])["metadata"] == {"after": "it"}


def test_a_disk_that_hangs_holds_up_nobody(logged, caplog, monkeypatch):
    """A write on the event loop stops every answer; an endless queue fills the memory."""
    monkeypatch.setattr("trimtab.serving.generation_log._MAX_WAITING", 2)
    served, read = logged()
    may_write = threading.Event()
    write = os.write

    def hanging(handle: int, data: bytes) -> int:
        assert may_write.wait(30)
        return write(handle, data)

    monkeypatch.setattr("trimtab.serving.generation_log.os.write", hanging)
    try:
        with caplog.at_level(logging.WARNING, logger="trimtab.serving"):
            for _ in range(4):
                assert served.chat().status_code == 200
        assert served.metric(NOT_LOGGED) == 2
        assert f'{NOT_LOGGED}{{reason="busy"}} 2.0' in served.http.get("/metrics").text
    finally:
        may_write.set()
    read(2)


@pytest.mark.parametrize("name", ["missing/log.jsonl", "folder", "pipe"])
def test_a_file_that_cannot_be_opened_stops_the_start(serve, tmp_path, name):
    """A server that runs for a week before anybody finds the log empty."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrimtabError, match="generation log"):
        serve(log_generations=tmp_path / name)


def test_what_waits_is_written_at_the_end(serve, file):
    """The last answers before Ctrl-C that never reach the file."""
    served = serve(log_generations=file)
    for _ in range(20):
        served.chat()
    served.server.should_exit = True
    served.until(lambda: served.engine.is_stopped)
    served.until(lambda: served.app.state.server.generation_log._fd == -1)
    assert len(lines(file)) == 20


PAIRS = {f"k{i}": "v" for i in range(17)}


@pytest.mark.parametrize(
    ("metadata", "param"),
    [("concise", "metadata"), (["a"], "metadata"), (PAIRS, "metadata"), ({"n": 7}, "metadata.n"),
     ({"n": None}, "metadata.n"), ({"k" * 65: "v"}, "metadata"), ({"k": "v" * 513}, "metadata.k"),
     ({"k": {"deep": "v"}}, "metadata.k")],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize("route", ["chat/completions", "completions", "attributions"])
def test_metadata_has_openais_limits(fake_served, route, metadata, param):
    """Labels that are cut, dropped or turned into text, and found wrong after a month of logs."""
    what = {"prompt": "Once"} if route == "completions" else {"messages": TURNS}
    body = {"model": "toy", **what, "metadata": metadata}
    answer = fake_served.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert len(answer.text) < 1000


def test_the_longest_labels_survive(logged):
    """Limits that refuse what OpenAI takes."""
    served, read = logged()
    metadata = {f"{i:02}" + "é" * 62: "ü" * 512 for i in range(16)}
    assert served.chat(metadata=metadata).status_code == 200
    assert served.chat(metadata=None).status_code == 200
    assert served.chat(metadata={}).status_code == 200
    assert [line["metadata"] for line in read(3)] == [metadata, None, {}]

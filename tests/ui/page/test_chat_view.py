"""What the chat shows: strangers' text as text, numbers on hover, signs before the text breaks."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from trimtab.ui.page.chat_view import SURPRISE, last_html, legend_html, past_html
from trimtab.ui.page.conversation import Answer, Conversation, Piece, Turn
from trimtab.ui.page.gauges import gauges_html, repetition_gauge, surprise_gauge
from trimtab.ui.page.run_settings import read_settings
from trimtab.ui.page.share import share_html
from trimtab.ui.page.snippets import as_curl, as_json, as_python

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e{{value}}"


def turn_of(steered: Answer, baseline: Answer | None = None) -> Turn:
    return Turn(read_settings({"prompt": HOSTILE}), baseline or Answer(), steered)


def chat_of(turn: Turn) -> Conversation:
    return Conversation(turns=[turn])


def test_what_a_model_or_a_person_says_is_never_html():
    """A prompt or an answer with a tag in it must not run in anybody's browser."""
    said = Answer([Piece(HOSTILE, (HOSTILE,), -1.0, {HOSTILE: {HOSTILE: 0.5}})], error=HOSTILE)
    html = last_html(chat_of(turn_of(said)), colour=HOSTILE) + legend_html(
        HOSTILE, {HOSTILE: [HOSTILE]}
    )
    assert "<img" not in html
    assert "\u202e" not in html
    assert html.count("&lt;img") >= 4
    assert "<img" not in share_html('"><img src=x>')


def test_what_is_finished_is_apart_from_what_grows():
    """Forty turns drawn anew twelve times a second leave the server no time to answer."""
    first, last = (turn_of(Answer([Piece(text)], finish="stop")) for text in ("One", "Two"))
    chat = Conversation(turns=[first, last])
    assert ("One" in past_html(chat), "Two" in past_html(chat)) == (True, False)
    assert ("One" in last_html(chat), "Two" in last_html(chat)) == (False, True)
    assert 'data-turn="1"' in past_html(chat)
    assert 'data-turn="2"' in last_html(chat)
    assert "aria-live" not in past_html(chat)
    assert past_html(chat_of(last)) == past_html(Conversation()) == ""
    assert "Ask something" in last_html(Conversation())


def test_surprise_stands_at_the_words_it_was_read_at():
    """Tokens of the two readings differ; places in the text do not."""
    answer = Answer([Piece("One"), Piece(" two")], surprise=[(2, 1.0), (3, 0.5), (7, 6.0)])
    html = last_html(chat_of(turn_of(answer)), colour=SURPRISE)
    assert "surprise 1.50 nats" in html
    assert "surprise 6.00 nats" in html
    assert "var(--tt-minus) 70%" in html  # the strongest


def test_a_probes_reading_colours_and_is_told_in_numbers():
    """A colour alone says nothing to those who cannot see it."""
    readings = {"tone": {"kind": 0.9, "casual": 0.1}, "warm": {"warm": 0.2}}
    answer = Answer([Piece("One", ("One",), -0.1, readings)])
    html = last_html(chat_of(turn_of(answer)), colour="tone")
    assert "var(--tt-label-0) 63%" in html
    assert "tone: kind 0.90, casual 0.10" in html
    assert "var(--tt-minus) 42%" in last_html(chat_of(turn_of(answer)), colour="warm")


@pytest.mark.parametrize(
    ("tokens", "level"),
    [
        (["a", "b", "c", "d", "e", "f"], "good"),
        (["a", "b", "c"] * 8, "bad"),
        ([], "none"),
        ([str(i) for i in range(100)] + ["a"] * 40, "bad"),  # it broke just now
        (["a"] * 40 + [str(i) for i in range(100)], "good"),  # and has found back
    ],
)
def test_repetition_is_that_of_the_last_tokens(tokens: list[str], level: str):
    """A long good beginning would hide the loop."""
    answer = Answer([Piece(token, (token,)) for token in tokens])
    assert repetition_gauge(answer).level == level


@pytest.mark.parametrize(
    ("own", "steered", "level"),
    [(1.0, 1.0, "good"), (1.0, 1.3, "good"), (1.0, 1.5, "warn"), (1.0, 1.8, "bad")],
)
def test_surprise_is_judged_beside_the_models_own(own: float, steered: float, level: str):
    """What is odd for one model and prompt is usual for another."""
    turn = turn_of(Answer(surprise=[(1, steered)]), Answer(surprise=[(1, own)]))
    gauge = surprise_gauge(turn)
    assert gauge.level == level
    assert f"{steered:.2f} nats (own {own:.2f})" in gauge.value


def test_the_warning_comes_when_a_gauge_breaks_and_in_words():
    """The one thing nobody else shows."""
    looping = Answer([Piece(t, (t,)) for t in ["a", "b", "c"] * 8])
    assert "falling apart" in gauges_html(turn_of(looping))
    assert "falling apart" not in gauges_html(turn_of(Answer([Piece("a", ("a",))])))


def test_the_dose_has_a_bar_a_layer_in_the_layers_order():
    """Layer 10 after layer 9, not after layer 1."""
    turn = turn_of(Answer())
    turn.dose = {"10": 0.2, "9": 0.1}
    html = gauges_html(turn)
    assert html.index("layer 9: 0.100") < html.index("layer 10: 0.200")
    assert "up to 0.20" in html


BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": 'It\'s "so" $HOME `x`\n<b>'}],
    "max_tokens": 5,
    "temperature": 0.0,
    "steering": {"vectors": [{"id": "warm", "scale": 1.0}]},
}


def test_the_curl_line_sends_what_is_shown():
    """A quote in a prompt would break the line, or run something."""
    words = shlex.split(as_curl(BODY, url="http://127.0.0.1:8000", has_key=True))
    assert words[0] == "curl"
    assert json.loads(words[words.index("-d") + 1]) == BODY == json.loads(as_json(BODY))
    assert "authorization: Bearer YOUR_KEY" in words


def test_the_python_runs_and_sends_what_is_shown():
    """A program that does not run is worse than none."""
    stand_in = (
        "import sys, types, json\n"
        "class Call:\n"
        "    def __getattr__(self, name): return self\n"
        "    def create(self, **sent):\n"
        "        sent |= sent.pop('extra_body', {})\n"
        "        print(json.dumps(sent)); raise SystemExit\n"
        "fake = types.ModuleType('openai'); fake.OpenAI = lambda **given: Call()\n"
        "sys.modules['openai'] = fake\n"
    )
    code = stand_in + as_python(BODY, url="http://127.0.0.1:8000", has_key=False)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(found.stdout) == BODY, found.stderr

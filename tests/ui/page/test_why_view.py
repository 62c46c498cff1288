"""What the Why tab shows of an explanation: the figures, in words and under the pointer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from attribution_wire import wire

from trimtab.ui.page.conversation import Turn
from trimtab.ui.page.run_settings import read_settings
from trimtab.ui.page.why_question import How, Question
from trimtab.ui.page.why_run import Explanation
from trimtab.ui.page.why_tab import about_html
from trimtab.ui.page.why_view import progress_html, result_html

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e"
RECEIPT = {
    "applied": [{"kind": "vector", "id": "warm", "scale": 1.0}],
    "layers": [3, 4],
    "dose": {"3": 0.1, "4": 0.2},
}
TOKENS = (("<s>", None), ("Is ", 1.0), ("it", -0.5), ("?", 0.25), ("</s>", None))
OTHERS = (("<s>", None), ("Is ", 0.25), ("it", -0.5), ("?", 0.5), ("</s>", None))


def explanation(*results: dict[str, Any], sides: tuple[bool, ...] = (False,), **more: Any) -> Any:
    turn = Turn(read_settings({"prompt": "Is it?", "vectors": [{"id": "warm", "scale": 1.0}]}))
    question = Question(
        [{"role": "user", "content": "Is it?"}],
        more.pop("answers", {"target": "Yes"}),
        more.pop("names", {"target": "Steered answer"}),
        turn,
        sides,
    )
    return Explanation(question, How(), list(results), **more)


def spans(html: str) -> list[tuple[str, str, str]]:
    """Class, title and text of the first heat map's spans."""
    (found, *_) = re.findall(r'<div class="tt-heat"[^>]*>(.*?)</div>', html, re.DOTALL)
    return re.findall(r'<span class="([^"]*)" title="([^"]*)">(.*?)</span>', found, re.DOTALL)


def test_every_word_has_its_number_and_the_template_is_dimmed():
    """Catches colours without figures, and template tokens that look as if they were scored."""
    shown = spans(result_html(explanation(wire(*TOKENS))))
    assert [text for *_, text in shown] == ["&lt;s&gt;", "Is ", "it", "?", "&lt;/s&gt;"]
    assert [look for look, *_ in shown] == [
        "tt-frame tt-template",
        "tt-p tt-a100",
        "tt-n tt-a51",
        "tt-p tt-a25",
        "tt-frame tt-template",
    ]
    assert [title.rpartition(", ")[2] for _, title, _ in shown] == [
        "template",
        "+1.000000",
        "-0.500000",
        "+0.250000",
        "template",
    ]


def test_numbers_do_not_need_a_pointer():
    """Catches figures that people with a keyboard or a touch screen cannot get at."""
    html = result_html(explanation(wire(*TOKENS)))
    every = html.split("Every token of the prompt")[1]
    for figure in ("+1.000000", "-0.500000", "+0.250000"):
        assert f"<td>{figure}</td>" in every
    assert "<details" in html
    assert '<th scope="col">score, nats</th>' in every


def test_completeness_and_what_it_took_are_said():
    """Catches scores shown without what they miss, what steered them or what they cost."""
    summary = {"residual": 0.7, "completeness_gap": 0.7, "error_bound": None}
    steered = wire(*TOKENS, summary=summary, more={"steering": RECEIPT})
    html = result_html(explanation(steered, sides=(True,)))
    assert "the difference between the two is +2.000: a residual of +0.700." in html
    assert "Steered: +1 warm at layers 3-4, dose 0.10-0.20 of |h|." in html
    assert "attnlrp on toy in float32: 3 passes, 1 gradient" in html
    assert "Steered answer: log P -1.000 nats</h2>" in html


def test_a_doubt_names_options_that_the_tab_has():
    """Catches advice for a command line, which the page has not."""
    much = {"residual": -1.5, "completeness_gap": 0.0, "error_bound": 2.0}
    html = result_html(explanation(wire(*TOKENS, summary=much, params={"points": 9})))
    assert "do not trust the order" in html
    assert "Try points=17 among the method&#x27;s options." in html
    assert "--set" not in html


def test_the_difference_is_a_third_map_on_the_same_scale():
    """Catches two maps that cannot be compared, or a difference without its parts."""
    steered = wire(*TOKENS, more={"steering": RECEIPT})
    html = result_html(explanation(steered, wire(*OTHERS), sides=(True, False)))
    assert html.count('<div class="tt-heat"') == 3
    assert len(set(re.findall(r'<span class="tt-ends">−([\d.]+)<', html))) == 1
    assert "one scale" in html
    assert "+0.750000, from +0.250000 unsteered to +1.000000 steered" in html
    assert "<td>+1.000000</td><td>+0.250000</td><td>+0.750000</td>" in html
    # Most changed first: which word, how much, from what to what.
    words = html.split("Words that changed most")[1]
    assert re.findall(r"<td>(.*?)</td>", words)[:6] == [
        *("+0.750", "+1.000", "+0.250"),
        *("-0.250", "+0.250", "+0.500"),
    ]
    assert "log P -1.000 nats under the steering, log P -1.000 nats without steering" in html


def test_the_first_side_is_shown_while_the_second_is_asked():
    """Catches a comparison that shows nothing until all of it is there."""
    one = explanation(wire(*TOKENS, more={"steering": RECEIPT}), sides=(True, False))
    html = result_html(one)
    assert "Under the steering" in html
    assert "Difference" not in html
    assert "2 of 2, without steering" in progress_html(one)


def test_strangers_text_is_text():
    """Catches a prompt, an answer, a name or a server's words that become part of the page."""
    tokens = ((HOSTILE, None), (HOSTILE, 1.0), (HOSTILE, -1.0))
    result = wire(*tokens, method=HOSTILE, params={HOSTILE: HOSTILE})
    answers = {"target": HOSTILE}
    shown = explanation(result, result, sides=(False, False), answers=answers, names=answers)
    card = {"summary": HOSTILE, "source": HOSTILE, "params": {HOSTILE: HOSTILE}}
    waiting = explanation(sides=(False, False), names=answers)
    html = result_html(shown) + about_html(card) + progress_html(waiting)
    assert "<img" not in html
    assert "\u202e" not in html
    assert html.count("&lt;img") >= 12


@pytest.mark.parametrize(
    ("progress", "said", "bar"),
    [
        ({}, "asking the server", "<progress aria-label"),
        ({"position": 2, "done": 0, "total": 0}, "2 before it", "<progress aria-label"),
        (
            {"position": 0, "done": 12, "total": 35, "eta_s": 4.25},
            "12 of 35 rows read, 4 s left",
            'value="12" max="35"',
        ),
        ({"done": 0, "total": 35, "eta_s": None}, "0 of 35 rows read<", 'value="0" max="35"'),
    ],
)
def test_progress_is_a_bar_and_words(progress, said, bar):
    """Catches a bar that does not move, and an estimate that nobody made."""
    html = progress_html(explanation(progress=progress))
    assert said in html
    assert bar in html


@pytest.mark.parametrize("end", [{"error": "No."}, {"is_cancelled": True}])
def test_a_bar_does_not_outlive_its_work(end):
    """Catches a page that seems busy for ever."""
    assert progress_html(explanation(**end)) == ""
    assert progress_html(explanation(wire(*TOKENS))) == ""


def test_a_method_says_what_it_does_and_who_says_so():
    """Catches a choice between names."""
    card = {"summary": "Masks.", "source": "Somebody, 2020.", "params": {"samples": 128}}
    html = about_html(card)
    for part in ("Masks.", "Somebody, 2020.", "samples=128"):
        assert part in html
    assert "does not list" in about_html(None)

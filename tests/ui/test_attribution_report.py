"""What people see of an attribution: the words, the colours, the terminal and the page."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from attribution_wire import wire

from trimtab.ui import colour_scale
from trimtab.ui.attribution_page import attribution_page
from trimtab.ui.attribution_report import Report
from trimtab.ui.attribution_text import attribution_text, coloured, facts
from trimtab.ui.colour_scale import INK, nearest_of_256, tint
from trimtab.ui.visible_text import visible

ESCAPES = re.compile("\x1b\\[[0-9;]*m")
HOSTILE = "<script>alert('&amp;')</script>\x1b]0;mine\x07\x1b[2J"
HEBREW = "שלום עולם"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 16 million colours."""
    for module in ("attribution_text", "terminal"):
        monkeypatch.setattr(f"trimtab.ui.{module}.has_colour", lambda stream: True)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("COLORFGBG", raising=False)


class Page(HTMLParser):
    """Reads a page: the prompt's text, and what a browser would run or load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.attributes: set[str] = set()
        self.style = ""
        self.policy = ""
        self.prompt = ""
        self._in = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.attributes |= set(named)
        if tag == "style":
            self._in = "style"
        if named.get("class") == "tt-heat":
            self._in = "prompt"
        if self._in == "prompt" and tag == "span":
            self.titles.append(named["title"])
        if named.get("http-equiv"):
            self.policy = named["content"]

    def handle_endtag(self, tag):
        if tag in ("style", "div"):
            self._in = ""

    def handle_data(self, data):
        if self._in == "style":
            self.style += data
        if self._in == "prompt":
            self.prompt += data


def test_bytes_of_a_character_go_with_the_token_that_carries_it():
    """Catches empty words on the screen, and scores that are shown nowhere."""
    report = Report(wire(("I ", 0.5), ("", 0.1), ("", -0.3), ("日", 1.0), ("\n", None), ("", None)))
    assert [(p.text, p.indexes) for p in report.pieces] == [
        ("I ", (0,)),
        ("日", (1, 2, 3)),
        ("\n", (4,)),
        ("", (5,)),
    ]
    assert report.pieces[1].score == pytest.approx(0.8)
    assert report.pieces[1].where == "1-3"
    shown = sum(piece.score for piece in report.scored)
    assert shown == pytest.approx(report.result["summary"]["sum"])


def test_bytes_without_a_carrier_are_kept():
    """Catches a score that is lost because the prompt ends, or the template begins, too soon."""
    report = Report(wire(("a", 1.0), ("", 2.0), ("\n", None)))
    assert [piece.score for piece in report.pieces] == [1.0, 2.0, None]


def test_one_outlier_does_not_bleach_the_rest():
    """Catches a scale that ends at the largest score, and shares beyond the scale."""
    report = Report(wire(*[("w ", 1.0)] * 200, ("!", -50.0)))
    assert report.end == 1.0
    assert [report.share(report.pieces[i]) for i in (0, 200)] == [1.0, -1.0]


def test_scores_of_zero_have_a_scale():
    """Catches a division by zero where nothing mattered."""
    report = Report(wire(("a", 0.0), ("b", 0.0)))
    assert report.share(report.pieces[0]) == 0.0
    assert "a" in attribution_page(report)


def test_a_terminal_cannot_be_ordered_about(terminal):
    """Catches a prompt that sets the window's title, clears the screen or reorders the line."""
    report = Report(wire((HOSTILE, 1.0), ("\u202eabc", -1.0)), {"target": HOSTILE})
    shown = attribution_text(report)
    assert "\x1b" not in ESCAPES.sub("", shown)
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "⟨U+202E⟩abc" in shown
    assert visible("a\r\nb\x00\t\x85\ud800") == "a␍↵\nb␀⇥\t⟨U+0085⟩⟨U+D800⟩"


def test_coloured_text_is_the_prompt(terminal):
    """Catches words that are dropped or moved, and the sign shown in the other colour."""
    report = Report(wire(("<s>\n", None), ("Is ", 1.0), (HEBREW, -1.0), ("?", 0.0), ("\n", None)))
    shown = coloured(report)
    assert ESCAPES.sub("", shown).replace("↵\n", "\n") == f"<s>\nIs {HEBREW}?↵"
    red, blue = (";".join(map(str, tint(s, paper="dark"))) for s in (1.0, -1.0))
    assert f"48;2;{red}mIs \x1b[0m" in shown
    assert f"48;2;{blue}m{HEBREW}\x1b[0m" in shown
    assert "\x1b[2m<s>↵\x1b[0m\n" in shown
    assert "\x1b[0m?\x1b[2m" in shown  # zero is bare


@pytest.mark.parametrize("paper", ["light", "dark"])
def test_colours_can_be_read(paper):
    """Catches text that cannot be told from its colour (WCAG AA: 4.5 to 1)."""

    def light(rgb):
        parts = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for share in (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0):
        ends = sorted((light(tint(share, paper=paper)), light(INK[paper])))
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 4.5


@pytest.mark.parametrize("paper", ["light", "dark"])
def test_few_colours_keep_the_sign(paper):
    """Catches a weak tint that turns grey where there are 256 colours."""
    for size in (0.3, 0.6, 1.0):
        for sign, is_red in ((1, True), (-1, False)):
            code = nearest_of_256(tint(sign * size, paper=paper)) - 16
            red, blue = code // 36, code % 6
            assert (red > blue) == is_red, (sign * size, code)
            assert red != blue


def test_a_light_terminal_gets_light_colours(terminal, monkeypatch):
    """Catches dark patches on a white terminal that says that it is white."""
    monkeypatch.setenv("COLORFGBG", "0;15")
    shown = colour_scale.painted("x", 0.5)
    assert "48;2;" + ";".join(map(str, tint(0.5, paper="light"))) in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "promises no sum"),
        (
            {"summary": {"residual": 0.0, "completeness_gap": 0.0}},
            "sum to +2.000, the difference between the two.",
        ),
        (
            {"summary": {"residual": -0.4, "completeness_gap": 0.0, "error_bound": 0.9}},
            "after a residual of -0.400 was handed out. Together they may be 0.900 off.",
        ),
        (
            {"summary": {"residual": 0.7, "completeness_gap": 0.7}},
            "between the two is +2.000: a residual of +0.700.",
        ),
        (
            {"params": {"explained": 0.83}, "summary": {"residual": 0.0, "completeness_gap": 0}},
            "83.0%",
        ),
        ({"summary": {"units": "share"}}, "shares of all that counts, not nats"),
    ],
)
def test_completeness_is_said_in_words(changes, said):
    """Catches a sum that is promised, or a correction that is not told of."""
    assert said in Report(wire(("a", 2.0), **changes)).completeness


def test_a_large_miss_of_a_path_is_a_warning():
    """Catches scores of a path integral that missed most of the difference, shown as if exact."""
    much = {"residual": -1.5, "completeness_gap": 0.0, "error_bound": 2.0}
    report = Report(wire(("a", 2.0), summary=much, params={"points": 9}))
    assert "--set points=17" in (report.doubt or "")
    assert report.doubt in attribution_page(report)
    little = {"residual": 0.01, "completeness_gap": 0.0, "error_bound": 2.0}
    assert Report(wire(("a", 2.0), summary=little)).doubt is None


def test_a_poor_fit_is_a_warning():
    """Catches a fit of masks that explains next to nothing, shown like any other."""
    summary = {"residual": 0.0, "completeness_gap": 0.0}
    poor = Report(wire(("a", 2.0), summary=summary, params={"samples": 16, "explained": 0.26}))
    assert "--set samples=64" in (poor.doubt or "")
    good = Report(wire(("a", 2.0), summary=summary, params={"samples": 16, "explained": 0.97}))
    assert good.doubt is None


def test_faithfulness_is_said_beside_its_control():
    """Catches a figure without the one that chance gets, or one that is never shown."""
    area = {"value": 5.0, "control": 0.25, "control_sd": 0.5}
    loss = {"value": 4.0, "control": 1.5, "control_sd": 0.5}
    measured = {"faithfulness": {"delta_af": area, "aopc": loss}}
    report = Report(wire(("a", 2.0), more=measured))
    assert "+5.000 nats" in (report.faithfulness or "")
    assert "+0.250" in (report.faithfulness or "")
    assert "Faithfulness" in facts(report)
    assert "Faithfulness" in attribution_page(report)
    assert Report(wire(("a", 2.0))).faithfulness is None


def test_page_runs_nothing_and_loads_nothing():
    """Catches a prompt or an answer that becomes a part of the page."""
    report = Report(wire((HOSTILE, 1.0), ('" onmouseover="x', -1.0)), {"target": HOSTILE})
    source = attribution_page(report)
    page = Page(source)
    assert "script" not in page.tags
    assert "<script" not in source
    assert not {"onmouseover", "style", "src", "href"} & page.attributes
    assert not {"img", "link", "iframe", "a"} & set(page.tags)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert page.policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "\x1b" not in source


def test_page_shows_the_prompt_as_it_is():
    """Catches right-to-left text that is cut, turned around or not given its own direction."""
    pieces = (("<s>\n", None), ("Say: ", 1.0), (HEBREW, -0.5), ("\n", 0.1), ("&lt;\t", 0.2))
    report = Report(wire(*pieces), {"target": HEBREW})
    page = Page(attribution_page(report))
    assert page.prompt.replace("↵", "").replace("⇥", "") == report.result["text"]
    assert page.prompt.count("↵\n") == 2
    assert "dir" in page.attributes
    assert "unicode-bidi:plaintext" in page.style
    assert page.titles[2] == f"#2 {HEBREW!r}, id 102, text, -0.500000"
    assert "@media(prefers-color-scheme:dark)" in page.style


def test_page_strength_is_the_score():
    """Catches a page whose colours do not follow the scores."""
    source = attribution_page(Report(wire(("a", 1.0), ("b", -0.5), ("c", 0.0))))
    strengths = re.findall(r'<span class="tt-([pn]) tt-a(\d+)"', source)
    assert strengths == [("p", "100"), ("n", "51"), ("n", "0")]
    assert ".tt-a100{--tt-a:100%}" in source

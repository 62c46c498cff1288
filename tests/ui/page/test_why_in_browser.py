"""The Why tab in a real browser, against the real server and the real model."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from browser import keep_screenshot
from chat_on_page import PATIENCE_MS
from why_on_page import IS_OVER, PROMPT, STEERING, WhyPage

from trimtab.ui.page.why_question import AGAINST, STEERED, UNSTEERED

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ENDLESS = ("shapley_sampling", "orders=256")  # minutes of work, within what the server allows


def n_jobs(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("trimtab_attributions "))
    return int(float(line.split()[-1]))


def wait_for_no_job(page: Page, url: str) -> None:
    for _ in range(PATIENCE_MS // 100):
        if n_jobs(url) == 0:
            return
        page.wait_for_timeout(100)
    raise AssertionError("the server still attributes")


def attributed(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/attributions",
        json.dumps({"model": "smollm2", **body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_the_last_answer_is_explained_word_by_word(open_page, served_page):
    """Catches a map of another question, or one whose numbers cannot be read off."""
    why = WhyPage(open_page(), served_page.url)
    said = why.chat.text("steered")
    why.choose("attnlrp")
    why.page.wait_for_function(
        "document.querySelector('#why-about').innerText.includes('arXiv 2402.05602')"
    )
    assert why.explain() == ""
    result = why.page.inner_text("#why-result")
    assert said.strip() in result
    assert "attnlrp promises no sum" in result
    assert "Steered: +2 optimistic at layer" in result
    # What stands under the pointer is what the server says of that token.
    word = why.page.locator("#why-result .tt-heat span", has_text="tree")
    word.hover()
    box = word.bounding_box()
    title = why.page.evaluate(
        "([x, y]) => document.elementFromPoint(x, y).title",
        [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2],
    )
    messages = [{"role": "user", "content": PROMPT}]
    alone = attributed(
        served_page.url, messages=messages, target=said, method="attnlrp", steering=STEERING
    )
    (token,) = (token for token in alone["input"] if token["token"] == " tree")
    assert title.startswith(f"#{token['index']} ' tree', id {token['token_id']}, text, ")
    assert float(title.split()[-1]) == pytest.approx(token["score"], abs=0.02)
    rows = why.table()
    assert [row[3] for row in rows] == [token["kind"] for token in alone["input"]]
    assert rows[token["index"]][4] == title.split()[-1]
    # The template is grey and bare, words are on their colours.
    frame = why.page.locator("#why-result .tt-heat .tt-template").first
    assert frame.evaluate("it => getComputedStyle(it).backgroundColor") == "rgba(0, 0, 0, 0)"
    strongest = why.page.locator("#why-result .tt-heat .tt-a100").first
    assert strongest.evaluate("it => getComputedStyle(it).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_the_difference_is_what_the_steering_did(open_page, served_page):
    """Catches three maps of one thing, or a difference that does not add up."""
    why = WhyPage(open_page(), served_page.url)
    why.choose("attnlrp")
    why.page.check("#why-compare input")
    assert why.explain() == ""
    assert why.page.locator("#why-result .tt-heat").count() == 3
    figures = [tuple(map(float, row[4:])) for row in why.table() if row[4]]
    assert figures
    for steered, unsteered, difference in figures:
        assert difference == pytest.approx(steered - unsteered, abs=1e-5)
    assert any(difference for *_, difference in figures)
    ends = why.page.locator("#why-result .tt-ends").all_inner_texts()
    assert len(set(ends)) == 1


@pytest.mark.parametrize("what", [UNSTEERED, AGAINST])
def test_the_other_answers_can_be_explained(open_page, served_page, what):
    """Catches a choice that is drawn and not asked."""
    why = WhyPage(open_page(), served_page.url)
    why.page.get_by_label(what, exact=True).check()
    why.choose("attnlrp")
    assert why.explain() == ""
    result = why.page.inner_text("#why-result")
    assert why.chat.text("baseline").strip() in result
    assert (why.chat.text("steered").strip() in result) == (what == AGAINST)
    assert ("log P(preferred) - log P(dispreferred)" in result) == (what == AGAINST)


def test_own_answers_are_told_apart_as_the_server_tells_them(open_page, served_page):
    """Catches answers that change places or are lost, and an old second one that stays."""
    prompt, preferred, dispreferred = "Is the sea warm today?", "Yes, quite warm.", "No, icy."
    why = WhyPage(open_page(), served_page.url, asks=False)
    why.choose("attnlrp")
    for other in (dispreferred, ""):
        why.type(prompt, preferred, other)
        assert why.explain() == ""
        result = why.page.inner_text("#why-result")
        assert ("log P(preferred) - log P(dispreferred)" in result) == bool(other)
        assert ("Dispreferred answer: log P" in result) == bool(other)
        assert preferred in result
        assert (dispreferred in result) == bool(other)
        answers = (
            {"preferred": preferred, "dispreferred": other} if other else {"target": preferred}
        )
        messages = [{"role": "user", "content": prompt}]
        alone = attributed(served_page.url, messages=messages, method="attnlrp", **answers)
        scores = [token["score"] for token in alone["input"] if token["score"] is not None]
        shown = [float(row[4]) for row in why.table() if row[4]]
        assert shown == pytest.approx(scores, abs=1e-4)
        assert any(scores)


def test_without_an_answer_it_says_where_to_get_one(open_page, served_page):
    """Catches an empty tab, and a button that does nothing."""
    why = WhyPage(open_page(), served_page.url, asks=False)
    why.page.wait_for_selector("#why-notice .tt-notice")
    assert "ask something in Chat first" in why.said()
    assert "Ask something in Chat first" in why.explain()
    # Once there is one the sentence is gone.
    why.page.get_by_role("tab", name="Chat").click()
    why.chat.send()
    why.chat.wait()
    why.page.get_by_role("tab", name="Why").click()
    why.page.wait_for_selector("#why-notice .tt-notice", state="detached")


def test_a_refusal_is_the_servers_sentence(open_page, served_page):
    """Catches a refusal that nobody sees, or one that ends the tab."""
    why = WhyPage(open_page(), served_page.url, asks=False)
    why.type("Is it?", "Yes", "No")
    why.choose("kernel_shap", "sample=3")
    assert "Did you mean 'samples'?" in why.explain()
    why.choose("kernel_shap", "samples=8")
    assert why.explain() == ""
    assert "Preferred answer: log P" in why.page.inner_text("#why-result")


def test_cancel_takes_the_job_from_the_server(open_page, served_page):
    """Catches a button that only hides what goes on."""
    why = WhyPage(open_page(), served_page.url, asks=False)
    why.type("How far is it to the sea from here, if you please?", "Far", "Near")
    why.choose(*ENDLESS)
    why.begin()
    assert "rows read" in why.page.inner_text("#why-progress")
    assert n_jobs(served_page.url) == 1
    why.page.click("#why-cancel")
    why.page.wait_for_function(IS_OVER)
    assert why.said() == "Cancelled."
    wait_for_no_job(why.page, served_page.url)


def test_who_leaves_leaves_no_job_behind(open_page, served_page):
    """Catches a closed tab that the server attributes for."""
    # What Gradio logs when a page is left in the middle of something.
    page = open_page(may_log=("AbortError", "Connection errored out"))
    why = WhyPage(page, served_page.url, asks=False)
    why.type("How far is it to the sea from here, if you please?", "Far", "Near")
    why.choose(*ENDLESS)
    why.begin()
    assert n_jobs(served_page.url) == 1
    why.page.goto("about:blank")
    wait_for_no_job(why.page, served_page.url)


def test_two_people_see_their_own(open_page, served_page):
    """Catches an explanation that belongs to the page, or one that ends another person's."""
    one = WhyPage(open_page(), served_page.url, asks=False)
    two = WhyPage(open_page(), served_page.url, asks=False)
    one.type("Is the sea blue?", "Yes, quite", "No")
    two.type("Was the hill green?", "Certainly", "Hardly")
    one.choose("feature_ablation")
    two.choose("feature_ablation")
    one.page.click("#why-explain")
    assert two.explain() == ""
    one.page.wait_for_function(IS_OVER)
    results = [why.page.inner_text("#why-result") for why in (one, two)]
    assert "Is the sea blue?" in results[0]
    assert "hill" not in results[0]
    assert "Was the hill green?" in results[1]
    assert "sea" not in results[1]


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_looked_at(open_page, served_page, width, is_dark):
    """Catches a page that scrolls sideways or cannot be walked by keyboard; writes a screenshot."""
    why = WhyPage(open_page(width=width, is_dark=is_dark), served_page.url)
    page = why.page
    page.get_by_label(STEERED, exact=True).check()
    why.choose("attnlrp")
    page.check("#why-compare input")
    assert why.explain() == ""
    for summary in page.locator("#why-result summary").all():
        summary.click()
    keep_screenshot(page, "why")
    page.get_by_label(STEERED, exact=True).focus()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.tagName == 'SUMMARY' ? document.activeElement.innerText : "
                "document.activeElement.closest('[id^=why]')?.id"
            )
        )
    for name in ("why-method", "why-compare", "why-explain", "why-cancel", "Settings"):
        assert name in reached, reached

"""The Chat tab in a real browser, against the real server and the real model."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING

import pytest
from browser import keep_screenshot
from chat_on_page import ChatPage, sees_both_sides

from trimtab.ui.page.run_settings import from_link, read_settings, to_link

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def link(**settings: object) -> str:
    return f"?run={to_link(read_settings(settings))}"


def running(url: str) -> int:
    """How many sequences the server generates for."""
    with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
        health = json.load(answer)
    return health["running"] + health["waiting"]


def wait_for_rest(page: Page, url: str) -> None:
    """Wait long for a busy machine, and not long enough for a story to end by itself."""
    for _ in range(400):
        if running(url) == 0:
            return
        page.wait_for_timeout(50)
    raise AssertionError("the server still generates")


STEERED = {"vectors": [{"id": "optimistic", "scale": 2.0}], "max_tokens": 24}


def test_both_answers_stream_in_pieces_and_say_what_was_done(open_page, served_page):
    """Catches a page that waits for the whole answer, or shows one side on both."""
    asked = link(prompt="What is a tree?", **STEERED)
    sees_both_sides(open_page(), served_page.url, query=asked)


def test_a_slider_moved_answers_again_and_leaves_the_baseline(open_page, served_page):
    """Catches a slider that does nothing until Send, and a baseline that is generated anew."""
    chat = ChatPage(open_page(), served_page.url, query=link(prompt="Is it far?", **STEERED))
    chat.send()
    chat.wait()
    before, plain = chat.text("steered"), chat.text("baseline")
    chat.slide("optimistic", "Home")  # to its smallest scale
    chat.page.wait_for_function(
        "document.querySelector('#stage [data-side=steered]').innerText.includes('-4 optimistic')"
    )
    chat.wait()
    assert chat.text("steered") != before
    assert chat.text("baseline") == plain


def test_a_second_turn_leaves_the_first_as_it_is(open_page, served_page):
    """Catches a chat that forgets, or draws all its turns anew for every token."""
    page = open_page()
    chat = ChatPage(page, served_page.url, query=link(prompt="Is it far?", **STEERED))
    chat.send()
    chat.wait()
    first = chat.text("steered")
    chat.choose(prompt="And back?")
    chat.send()
    page.evaluate("document.querySelector('#past [data-turn=\"1\"]').isSame = true")
    chat.wait()
    assert page.evaluate("document.querySelector('#past [data-turn=\"1\"]').isSame")
    assert first in page.inner_text('#past [data-turn="1"] [data-side="steered"]')
    assert "And back?" in page.inner_text('#stage [data-turn="2"]')
    page.click("#new-chat")
    page.wait_for_selector("#past [data-turn]", state="detached")
    page.wait_for_selector("#stage .tt-empty >> nth=0")


def test_classifiers_gates_ablation_and_probes_reach_the_server(open_page, served_page):
    """Catches a control that is drawn and not sent."""
    chat = ChatPage(
        open_page(),
        served_page.url,
        query=link(prompt="Who?", max_tokens=8, vectors=[{"id": "formal", "scale": 1.0}]),
    )
    page = chat.page
    page.click('[data-key="label-tone-empathetic"]')
    page.click('[data-key="label-tone-casual"]')
    page.click('[data-key="label-tone-casual"]')  # away
    page.click('[data-key="ablate-formal"]')
    page.select_option('[data-key="gate-probe"]', "formal")
    for key, value in (("gate-share", "0.25"), ("gate-layer", "0")):
        page.fill(f'[data-key="{key}"]', value)
        page.locator(f'[data-key="{key}"]').blur()
    page.click('[data-key="probe-tone"]')
    chat.send()
    chat.wait()
    page.click("#settings button")
    settings = from_link(page.get_attribute("#share-link", "href").removeprefix("?run="))
    assert settings.steering == {
        "vectors": [{"id": "formal", "scale": 1.0}],
        "ablate": [{"id": "formal"}],
        "guidance": [
            {"classifier": "tone", "target": ["empathetic"], "avoid": ["casual"], "scale": 1.0}
        ],
        "when": {"probe": "formal", "above": 0.25, "layer": 0},
    }
    assert settings.probes == ["tone"]
    steered = page.inner_text('#stage [data-side="steered"]')
    assert "toward empathetic, away from casual" in steered
    assert "formal ablated" in steered
    # The tokens carry what the probe read, and are coloured by it when asked.
    title = page.get_attribute('#stage [data-side="steered"] .tt-answer span', "title")
    assert "empathetic 0." in title
    page.click("#colour input")
    page.get_by_role("option", name="tone", exact=True).click()
    page.wait_for_selector('#stage .tt-answer span[style*="--tt-label-"]')


def test_the_settings_can_be_copied_and_asked_for_elsewhere(open_page, served_page):
    """Catches JSON that the server would not take."""
    chat = ChatPage(open_page(), served_page.url, query=link(prompt="Why?", **STEERED))
    chat.send()
    chat.wait()
    page = chat.page
    page.click("#settings button")
    body = json.loads(page.input_value("#as-json textarea"))
    request = urllib.request.Request(
        f"{served_page.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.load(answer)["choices"][0]["message"]["content"]
    assert said.strip() == chat.text("steered").strip()
    assert body["steering"] == {"vectors": [{"id": "optimistic", "scale": 2.0}]}
    assert served_page.url in page.input_value("#as-curl textarea")
    assert "extra_body" in page.input_value("#as-python textarea")
    page.fill("#preset-name input, #preset-name textarea", "bright")
    page.click("#save-preset")
    page.wait_for_selector("#chat-notice .tt-done")
    assert "smollm2:bright" in page.inner_text("#chat-notice")
    page.wait_for_selector('[data-key="preset"] option[value="bright"]', state="attached")


def test_what_is_no_longer_stored_can_be_taken_out(open_page, served_page):
    """Catches a link, or a deletion elsewhere, that leaves a chat with no answer and no way out."""
    run = link(
        prompt="Hm?",
        preset="gone",
        vectors=[{"id": "optimistic", "scale": 1.0}, {"id": "gone-vector", "scale": 1.0}],
        guidance=[{"classifier": "tone", "target": ["rude"]}],
        ablate=["gone-ablated"],
        when={"probe": "gone-gate", "above": 0.5},
        probes=["gone-probe"],
        max_tokens=4,
    )
    chat = ChatPage(open_page(), served_page.url, query=run)
    page = chat.page
    out = page.locator('[data-key^="missing-"]')
    assert out.all_inner_texts() == [
        "preset gone ×",
        "vector gone-vector ×",
        "classifier tone: rude ×",
        "ablated gone-ablated ×",
        "gate on gone-gate ×",
        "reading of gone-probe ×",
    ]
    assert page.input_value('[data-key="gate-probe"]') == "gone-gate"
    for left in range(5, -1, -1):
        out.first.click()
        page.wait_for_function(
            "n => document.querySelectorAll('[data-key^=missing-]').length == n", arg=left
        )
        # The keyboard goes on from here.
        assert page.evaluate("document.activeElement.dataset.key")
    chat.send()
    chat.wait()
    assert "+1 optimistic" in page.inner_text('#stage [data-side="steered"]')


def test_a_refusal_is_a_sentence(open_page, served_page):
    """Catches an error that nobody sees, or that shows a traceback."""
    wrong = link(prompt="Hm?", vectors=[{"id": "nobody", "scale": 1.0}])
    chat = ChatPage(open_page(), served_page.url, query=wrong)
    chat.page.click("#send")
    chat.page.wait_for_selector("#chat-notice .tt-problem")
    said = chat.page.inner_text("#chat-notice")
    assert "nobody" in said
    assert "optimistic" in said  # what there is
    assert chat.text("steered") == ""


def test_stop_ends_the_answer_and_the_servers_work(open_page, served_page):
    """Catches a button that only hides what goes on."""
    asked = link(prompt="Tell a very long story.", **{**STEERED, "max_tokens": 2000})
    chat = ChatPage(open_page(), served_page.url, query=asked)
    chat.send()
    chat.page.click("#stop")
    chat.wait()
    kept = chat.text("steered")
    assert kept
    assert "stopped" in chat.page.inner_text('#stage [data-side="steered"]')
    chat.page.wait_for_function("setTimeout(() => { window.later = true }, 300), window.later")
    assert chat.text("steered") == kept
    wait_for_rest(chat.page, served_page.url)


def test_who_leaves_leaves_no_work_behind(open_page, served_page):
    """Catches a closed tab that the server generates for."""
    asked = link(prompt="Tell a very long story.", **{**STEERED, "max_tokens": 2000})
    # Gradio's own script complains of the stream that leaving cuts off.
    page = open_page(may_log=("AbortError", "Connection errored out"))
    chat = ChatPage(page, served_page.url, query=asked)
    chat.send()
    assert running(served_page.url) >= 2
    chat.page.goto("about:blank")
    other = ChatPage(open_page(), served_page.url, query=link(prompt="Still there?"))
    wait_for_rest(other.page, served_page.url)


def test_two_people_neither_see_nor_steer_each_other(open_page, served_page):
    """Catches state that belongs to the page and not to the person."""
    asked = {"prompt": "How is the sea?", "max_tokens": 24}
    one = ChatPage(
        open_page(), served_page.url, query=link(**asked, vectors=[{"id": "formal", "scale": 3.0}])
    )
    two = ChatPage(
        open_page(),
        served_page.url,
        query=link(**asked, vectors=[{"id": "optimistic", "scale": 3.0}]),
    )
    one.send()
    two.page.click("#send")
    one.send()  # again, a second turn, while the other's first may still run
    two.page.wait_for_selector('#stage [data-side="steered"] .tt-answer span')
    two.wait()
    one.wait()
    stages = [chat.page.inner_text("#stage") for chat in (one, two)]
    assert "+3 formal" in stages[0]
    assert "optimistic" not in stages[0]
    assert "+3 optimistic" in stages[1]
    assert "formal" not in stages[1]
    assert two.page.locator('#stage [data-side="steered"] .tt-answer').count() == 1
    # Alone, the same request answers the same.
    alone = ChatPage(
        open_page(),
        served_page.url,
        query=link(**asked, vectors=[{"id": "optimistic", "scale": 3.0}]),
    )
    alone.send()
    alone.wait()
    assert alone.text("steered") == two.text("steered")


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_looked_at(open_page, served_page, width, is_dark):
    """Catches a page that scrolls sideways or cannot be walked by keyboard; writes a screenshot."""
    chat = ChatPage(
        open_page(width=width, is_dark=is_dark),
        served_page.url,
        query=link(prompt="What is a tree?", **STEERED),
    )
    page = chat.page
    chat.send()
    chat.wait()
    keep_screenshot(page, "chat")
    page.focus('[data-key="vector-optimistic"]')
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.dataset.key || document.activeElement.id || "
                "document.activeElement.closest('[id]')?.id"
            )
        )
    assert {"send", "stop", "label-tone-empathetic", "ablate-formal", "gate-probe"} <= reached

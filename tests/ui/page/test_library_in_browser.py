"""The Library tab in a real browser, against the real server and the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from browser import keep_screenshot

from trimtab.steering.vector import VectorArtifact, from_bytes, to_bytes
from trimtab.ui.page.chat_view import PLAIN
from trimtab.ui.page.run_settings import read_settings, to_link

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = "<img src=x onerror=alert(1)> of a stranger"
CALIBRATION = {
    "criteria": {"max_rise": 0.08, "max_repetition": 0.15},
    "n_pairs": 4,
    "candidates": [{"layers": [15], "dose": 0.1, "effect": 0.5}],
    "curve": [
        {"scale": scale, "margin": scale / 4, "moved": 1.0, "rise": scale**2 / 10}
        | {"repetition": 0.0, "entropy": 1.0, "surprise": 2.0}
        for scale in (-1.0, 0.0, 1.0, 2.0)
    ],
    "knee": {"layers": [15], "dose": 0.1, "is_clean": True, "problem": None},
}
PATIENCE_MS = 90_000


@pytest.fixture
def http(served_page) -> Iterator[httpx.Client]:
    """The server's API; what a test stores is removed after it."""
    with httpx.Client(base_url=f"{served_page.url}/v1/steering", timeout=60) as client:

        def ids() -> set[tuple[str, str]]:
            kinds = ("presets", "vectors", "classifiers")
            return {(kind, x["id"]) for kind in kinds for x in client.get(kind).json()["data"]}

        before = ids()
        yield client
        for kind, name in ids() - before:
            client.delete(f"{kind}/{name}")


def vector_of(http: httpx.Client, name: str) -> VectorArtifact:
    data = http.get("vectors/optimistic/content").content
    made = from_bytes(data, name=name).renamed(name)
    return replace(made, calibration=CALIBRATION, description=HOSTILE)


def store(http: httpx.Client, name: str) -> None:
    assert http.put(f"vectors/{name}", content=to_bytes(vector_of(http, name))).status_code == 201


def open_library(page, served_page):
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{served_page.url}/ui/")
    page.wait_for_selector("#steering-panel fieldset")
    page.get_by_role("tab", name="Library").click()
    page.wait_for_selector("#library-list .tt-card")
    return page


def choose(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.locator("#library-detail h2", has_text=name).wait_for()


def add(page, file: Path, name: str) -> None:
    """Give a vector's file to be stored, the form being open."""
    page.set_input_files("#library-file input", file)
    page.locator("#library-file p", has_text="Read: ").wait_for()
    # The field still names the file.
    assert page.input_value("#library-file input").endswith(file.name)
    page.fill("#library-file-name input, #library-file-name textarea", name)
    page.click("#library-store")


def colours(page) -> list[str]:
    """Open Chat's list of what tokens may be coloured by, and read it."""
    page.get_by_role("tab", name="Chat").click()
    page.click("#colour input")
    page.wait_for_selector("#colour [role=option]")
    options = page.locator("#colour [role=option]").all()
    return [option.get_attribute("aria-label") for option in options]


def said(page, kind: str) -> str:
    return page.inner_text(f"#library-notice .{kind}")


def offered(page) -> list[str]:
    """The vectors that the chat's panel offers or holds."""
    return page.locator('#steering-panel [data-key^="ablate-"]').all_inner_texts()


def test_of_two_quick_presses_the_last_is_shown(open_page, served_page, http):
    """Catches a press that is dropped because the one before it is being answered."""
    store(http, "zen")
    store(http, "calm")
    page = open_library(open_page(), served_page)
    choose(page, "optimistic")
    for first, last in (("zen", "calm"), ("calm", "zen")):
        page.evaluate(
            """names => names.forEach((name, i) => setTimeout(
                () => document.querySelector(`#library-list [data-id="${name}"]`).click(), 30 * i
            ))""",
            [first, last],
        )
        shown = page.locator("#library-detail h2", has_text=last)
        shown.wait_for(timeout=15_000)
        page.wait_for_timeout(500)
        assert shown.is_visible()


def test_a_vector_is_looked_at_compared_tried_and_taken_home(open_page, served_page, http):
    """Catches a tab that shows less than the API knows, or other numbers."""
    store(http, "zen")
    page = open_library(open_page(), served_page)
    choose(page, "zen")
    detail = page.inner_text("#library-detail")
    card = http.get("vectors/zen").json()
    for told in (
        card["method"],
        HOSTILE,
        card["data"]["name"],
        f"trimtab {card['trimtab_version']}",
    ):
        assert told in detail
    assert page.locator("#library img").count() == 0
    assert page.locator(f'#library-detail [title="{card["data"]["sha256"]}"]').count() == 1
    assert page.locator("#library-detail .tt-curve svg").is_visible()
    assert page.locator("#library-detail .tt-shares .tt-bar").count() == len(card["layers"])
    # The cosines are the API's, at the vectors' own layers and at one that is asked for.
    answer = http.get("similarities").json()
    for _ in range(2):
        cosines = dict(
            zip(answer["ids"], answer["matrix"][answer["ids"].index("zen")], strict=True)
        )
        title = f"zen and formal: {cosines['formal']:+.4f}"
        page.locator(f'#library-matrix td[title="{title}"]').wait_for()
        shown = page.inner_text(f'#library-matrix td[title="{title}"]')
        assert float(shown.replace("−", "-")) == pytest.approx(cosines["formal"], abs=0.006)
        if answer["layer"] is None:
            page.click("#library-layer input")
            page.get_by_role("option", name="layer 3", exact=True).click()
            answer = http.get("similarities", params={"layer": 3}).json()
    for button, kind in (("#library-download", "safetensors"), ("#library-gguf", "gguf")):
        with page.expect_download() as waiting:
            page.click(button)
        assert waiting.value.suggested_filename == f"zen.{kind}"
        content = http.get("vectors/zen/content", params={"format": kind}).content
        assert Path(waiting.value.path()).read_bytes() == content
    page.click("#library-try")
    page.wait_for_selector('[data-key="vector-zen"]')
    assert page.locator("#send").is_visible()


def test_a_vector_is_deleted_after_a_question_and_leaves_the_chat(open_page, served_page, http):
    """Catches a deletion by one press, one that hides what it breaks, a chat that offers it."""
    store(http, "zen")
    gate = {"probe": "tone/casual", "above": 0.5}
    gated = {"ablate": [{"id": "zen", "layers": [20], "when": gate}]}
    assert http.put("presets/deep", json=gated).status_code == 201
    page = open_library(open_page(), served_page)
    choose(page, "zen")
    page.click("#library-try")
    page.wait_for_selector('[data-key="vector-zen"]')
    page.get_by_role("tab", name="Library").click()
    page.click("#library-delete")
    page.wait_for_selector("#library-question li")
    assert "the vector zen" in page.inner_text("#library-question")
    assert "deep" in page.inner_text("#library-question")
    assert http.get("vectors/zen").status_code == 200
    page.get_by_role("button", name="Delete the vector zen").click()
    assert "Deleted the vector zen." in said(page, "tt-done")
    page.wait_for_function("!document.querySelector('#library-list [data-id=zen]')")
    page.wait_for_function("!document.querySelector('#library-matrix').innerText.includes('zen')")
    assert http.get("vectors/zen").status_code == 404
    page.get_by_role("tab", name="Chat").click()
    page.wait_for_function("!document.querySelector('#steering-panel').innerText.includes('zen')")
    assert "zen" not in offered(page)
    assert {"formal", "optimistic"} <= set(offered(page))
    page.get_by_role("tab", name="Library").click()
    page.get_by_label("Presets").check()
    choose(page, "deep")
    assert "the vector zen, which is not stored here" in page.inner_text("#library-detail")


def test_the_keyboard_alone_deletes_or_keeps(open_page, served_page, http):
    """Catches a focus that is lost with the button that was pressed."""
    store(http, "zen")
    page = open_library(open_page(), served_page)

    def goes_on_at(selector: str) -> None:
        page.wait_for_function("selector => document.activeElement.matches(selector)", arg=selector)

    def press(key: str, *, until: str) -> None:
        page.keyboard.press(key)
        page.wait_for_selector(until)

    page.focus('#library-list [data-id="zen"] button')
    press("Enter", until="#library-detail h2:has-text('zen')")
    goes_on_at('[data-id="zen"] button')
    page.focus("#library-delete")
    press("Enter", until="#library-question .tt-notice")
    page.keyboard.press("Tab")
    goes_on_at("#library-sure")
    page.keyboard.press("Tab")
    goes_on_at("#library-keep")
    page.keyboard.press("Enter")
    goes_on_at("#library-delete")
    assert http.get("vectors/zen").status_code == 200
    press("Enter", until="#library-question .tt-notice")
    page.keyboard.press("Tab")
    press("Enter", until="#library-notice .tt-done")
    goes_on_at("#library-list button")
    assert http.get("vectors/zen").status_code == 404


def test_what_went_meanwhile_is_told_in_the_servers_words(open_page, served_page, http):
    """Catches a page that shows or deletes what is gone as though it were there."""
    store(http, "zen")
    store(http, "zoo")
    page = open_library(open_page(), served_page)
    choose(page, "zen")
    page.click("#library-delete")
    page.wait_for_selector("#library-question .tt-notice")
    http.delete("vectors/zen")
    page.click("#library-sure")
    sentence = http.get("vectors/zen").json()["error"]["message"]
    assert said(page, "tt-problem") == sentence
    page.wait_for_function("!document.querySelector('#library-list [data-id=zen]')")
    http.delete("vectors/zoo")
    page.get_by_role("button", name="zoo", exact=True).click()
    page.locator("#library-notice", has_text="vector 'zoo'").wait_for()
    assert said(page, "tt-problem") == http.get("vectors/zoo").json()["error"]["message"]


def test_a_file_is_refused_or_stored(open_page, served_page, http, tmp_path):
    """Catches rubbish that is stored, and a stored file that list and chat do not offer."""
    page = open_library(open_page(), served_page)
    before = http.get("vectors").json()
    page.get_by_role("button", name="Add a file").click()
    rubbish, good = tmp_path / "rubbish.safetensors", tmp_path / "good.safetensors"
    rubbish.write_bytes(b"no vector at all")
    good.write_bytes(to_bytes(vector_of(http, "other")))
    add(page, rubbish, "zest")
    assert "not a" in said(page, "tt-problem")
    assert http.get("vectors").json() == before
    add(page, good, "zest")
    assert "Stored the vector zest." in said(page, "tt-done")
    page.locator("#library-detail h2", has_text="zest").wait_for()
    assert http.get("vectors/zest").json()["data"] == http.get("vectors/optimistic").json()["data"]
    page.get_by_role("tab", name="Chat").click()
    page.wait_for_selector('[data-key="ablate-zest"]')


def test_tokens_may_be_coloured_by_what_is_stored_now(open_page, served_page, http, tmp_path):
    """Catches a list as old as the visit, and a chat that goes on reading what was deleted."""
    page = open_library(open_page(), served_page)
    assert "zest" not in colours(page)
    file = tmp_path / "zest.safetensors"
    file.write_bytes(to_bytes(vector_of(http, "other")))
    page.get_by_role("tab", name="Library").click()
    page.get_by_role("button", name="Add a file").click()
    add(page, file, "zest")
    page.locator("#library-detail h2", has_text="zest").wait_for()
    page.wait_for_selector('[data-key="ablate-zest"]', state="attached")
    assert {"zest", "tone", "formal"} <= set(colours(page))
    page.locator("#colour").get_by_role("option", name="zest", exact=True).click()
    page.get_by_role("tab", name="Library").click()
    page.click("#library-delete")
    page.get_by_role("button", name="Delete the vector zest").click()
    page.wait_for_selector('[data-key="ablate-zest"]', state="detached")
    assert "zest" not in colours(page)
    assert page.input_value("#colour input") == PLAIN
    page.click("#send")
    page.wait_for_selector('#stage [data-side="steered"] .tt-answer span')


def test_a_long_library_leaves_the_chats_panel_short(open_page, served_page, http):
    """Catches fifty buttons above Sampling, and a choice from a picker that is not sent."""
    names = [f"{'zen-' * 12}{n}" for n in range(8)]
    for name in names:
        store(http, name)
    tone = http.get("classifiers/tone/content").content
    for n in range(3):
        assert http.put(f"classifiers/tone-{n}", content=tone).status_code == 201
    page = open_page(width=390)
    page.set_default_timeout(PATIENCE_MS)
    run = to_link(read_settings({"prompt": "Who?", "max_tokens": 4}))
    page.goto(f"{served_page.url}/ui/?run={run}")
    page.wait_for_selector("#steering-panel details")
    assert offered(page) == []
    page.select_option('[data-key="add-ablate"]', names[0])
    page.select_option('[data-key="add-ablate"]', names[1])
    page.wait_for_function(
        "document.querySelectorAll('#steering-panel [data-key^=ablate-]').length == 2"
    )
    assert offered(page) == names[:2]
    page.click(f'[data-key="ablate-{names[0]}"]')
    label = page.locator('[data-key="label-tone-1-empathetic"]')
    assert not label.is_visible()
    page.click('[data-key="fold-tone-1"]')
    label.click()  # toward
    label.click()  # away
    label.click()  # neither: what was unfolded stays so
    page.locator('#steering-panel details [data-key="label-tone-1-empathetic"]').click()
    page.click("#send")
    page.locator('#stage [data-side="steered"] .tt-foot', has_text="toward empathetic").wait_for()
    steered = page.inner_text('#stage [data-side="steered"]')
    assert f"{names[1]} ablated" in steered
    assert names[0] not in steered
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # A name leaves room for the numbers beside it.
    page.get_by_role("tab", name="Library").click()
    cell = page.locator("#library-matrix td").first
    cell.wait_for()
    box = cell.bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 390


def test_classifiers_and_presets_are_shown_whole(open_page, served_page, http):
    """Catches a kind whose list or detail does not draw."""
    spec = {"guidance": [{"classifier": "tone", "target": ["empathetic"]}]}
    assert http.put("presets/warmly", json=spec).status_code == 201
    page = open_library(open_page(), served_page)
    page.get_by_label("Classifiers").check()
    choose(page, "tone")
    detail = page.inner_text("#library-detail")
    card = http.get("classifiers/tone").json()
    for told in (", ".join(card["labels"]), "Named by the preset warmly", "0.12"):
        assert told in detail
    assert page.locator("#library-detail table").count() >= 3
    assert not page.is_visible("#library-gguf")
    assert not page.is_visible("#library-similarities")
    page.get_by_label("Presets").check()
    choose(page, "warmly")
    assert json.loads(page.inner_text("#library-detail pre")) == spec
    assert "smollm2:warmly" in page.inner_text("#library-detail")
    page.fill("#library-search input, #library-search textarea", "nothing like it")
    page.wait_for_selector("#library-list .tt-card", state="detached")
    page.fill("#library-search input, #library-search textarea", "TONE warm")
    page.wait_for_selector('#library-list [data-id="warmly"]')


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_walked_by_keyboard(open_page, served_page, http, width, is_dark):
    """Catches a page that scrolls sideways or needs a mouse; writes a screenshot."""
    store(http, "zen")
    page = open_library(open_page(width=width, is_dark=is_dark), served_page)
    page.get_by_role("button", name="zen", exact=True).focus()
    page.keyboard.press("Enter")
    page.locator("#library-detail h2", has_text="zen").wait_for()
    page.wait_for_selector("#library-matrix table")
    keep_screenshot(page, "library")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        at = "document.activeElement"
        reached.add(page.evaluate(f"{at}.id || {at}.closest('[id]')?.id"))
    buttons = {f"library-{x}" for x in ("refresh", "try", "download", "gguf", "delete", "layer")}
    assert buttons <= reached

"""The Build tab in a real browser, against the real server and the real model."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from build_on_page import PAIRS, BuildPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def asked(url: str) -> Any:
    """The JSON of a GET, or the status of a refusal."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_pasted_pairs_become_a_vector_that_steers_the_chat(open_page, served_page):
    """Catches a tab that builds something else than is pasted, or a Try that sets nothing."""
    page = open_page()
    page.add_init_script(
        "window.seen = []; new MutationObserver(() => { const at = document.querySelector("
        "'#build-progress'); if (at && at.innerText) window.seen.push(at.innerText) })"
        ".observe(document, {subtree: true, childList: true, characterData: true})"
    )
    build = BuildPage(page, f"{served_page.url}/ui/")
    build.type("build-vector-name", "cheery")
    build.tick("build-vector-calibrate", on=False)
    build.paste(PAIRS.replace(" || ", " | ", 2))
    build.start()
    assert "Line 1 is neither JSON nor" in build.problem()
    assert asked(f"{served_page.url}/v1/steering/vectors/cheery") == 404
    build.paste(PAIRS)
    build.start()
    assert "The vector cheery is built and stored" in build.end()
    assert page.evaluate("window.seen.length"), "it showed no progress"
    assert "Not calibrated" in page.inner_text("#build-result")
    card = asked(f"{served_page.url}/v1/steering/vectors/cheery")
    assert card["data"]["n_fit"] + card["data"]["n_calibration"] + card["data"]["n_held"] == 14

    with page.expect_download() as download:
        page.click("#build-gguf")
    assert download.value.suggested_filename == "cheery.gguf"
    assert download.value.path().read_bytes()[:4] == b"GGUF"

    build.start()
    assert "already" in build.problem()
    page.click("#build-try")
    page.wait_for_selector('[data-key="vector-cheery"]', state="visible")
    page.fill("#prompt textarea", "Is it far?")
    page.click("#send")
    page.wait_for_selector('#stage [data-side="steered"] .tt-foot:has-text("cheery")')
    assert "+1 cheery at layer" in page.inner_text('#stage [data-side="steered"]')


def test_a_build_goes_on_without_its_page_and_stores_nothing_once_cancelled(open_page, served_page):
    """Catches a build that ends with its page, a page that forgets it, and a cancel that stores."""
    first = open_page()
    build = BuildPage(first, f"{served_page.url}/ui/")
    build.type("build-vector-name", "doomed")
    build.start()
    first.wait_for_selector("#build-progress progress")
    first.close()

    page = open_page()
    build = BuildPage(page, f"{served_page.url}/ui/")
    page.wait_for_selector("#build-progress progress")
    assert "The vector doomed" in page.inner_text("#build-stage")
    page.click("#build-cancel")
    assert "cancelled; nothing was stored" in build.end()
    assert not page.inner_text("#build-progress").strip()
    assert page.is_disabled("#build-cancel")
    assert asked(f"{served_page.url}/v1/steering/vectors/doomed") == 404


def test_labelled_texts_from_a_file_become_a_classifier_that_reads(open_page, served_page):
    """Catches a file that does not reach the field, or a classifier without its confusion."""
    page = open_page()
    build = BuildPage(page, f"{served_page.url}/ui/")
    page.locator("#build-kind").get_by_label("classifier").check()
    page.locator("#build-classifier-source").get_by_label("my labelled texts").check()
    text = "".join(
        f"{label} || {thing} is {word}.\n"
        for label, word in (("glad", "lovely"), ("sad", "awful"))
        for thing in ("Rain", "Tea", "Snow", "Chess", "Bread", "Milk", "This", "Work")
    )
    file = {"name": "mood.txt", "mimeType": "text/plain", "buffer": text.encode()}
    page.set_input_files("#build-texts-file input", file)  # type: ignore[arg-type]
    page.wait_for_function("document.querySelector('#build-texts textarea').value.includes('Snow')")
    build.type("build-classifier-name", "mood")
    build.tick("build-classifier-calibrate", on=False)
    build.start()
    assert "The classifier mood is built and stored" in build.end()
    heads = page.locator("#build-result th").all_inner_texts()
    assert {"read as glad", "read as sad", "glad", "sad"} <= set(heads)
    page.click("#build-try")
    page.wait_for_selector('[data-key="label-mood-glad"]', state="visible")

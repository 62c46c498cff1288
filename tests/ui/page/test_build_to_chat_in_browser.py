"""Vectors from two descriptions and from pasted pairs, from the form to the steered chat."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from build_on_page import PAIRS, BuildPage
from page_before import page_before
from running_server import running
from toy_chat import toy_chat

from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.store import Store
from trimtab.ui.page.mount import PATH

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# What the form takes at the least: six pairs to fit on, and two prompts to calibrate on.
FEW_PAIRS = "\n".join(
    json.dumps(
        dict(zip(("prompt", "preferred", "dispreferred"), line.split(" || "), strict=True))
        | {"split": "build"}
    )
    for line in PAIRS.splitlines()[:8]
)
# The longest of these builds, on the real model beside other work.
BUILD_MS = 480_000


@dataclass(frozen=True)
class Built:
    """Where things are built: the server, and the page before it."""

    api: str
    page: str

    def card(self, name: str) -> Any:
        with urllib.request.urlopen(f"{self.api}/v1/steering/vectors/{name}", timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def toy_builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The embedded engine with a toy, which builds in seconds what takes the real model minutes."""
    engine = TransformersEngine(toy_chat)
    store = Store(tmp_path_factory.mktemp("toy") / "store")
    settings = ServerSettings(served_model_name="toy")
    with running(engine, store, settings=settings) as served, page_before(served.url) as address:
        yield Built(served.url, address)


@pytest.fixture(params=["toy", pytest.param("smollm2", marks=pytest.mark.extra)])
def builder(request: pytest.FixtureRequest) -> Built:
    """A server and its page, of each model in turn."""
    if request.param == "toy":
        toy: Built = request.getfixturevalue("toy_builder")
        return toy
    url = request.getfixturevalue("served_page").url
    return Built(url, url)


def tried(page, name: str) -> None:
    """Press Try, and ask something under what the panel then holds, read by it too."""
    page.click("#build-try")
    page.wait_for_selector(f'[data-key="vector-{name}"]', state="visible")
    page.click("#colour input")
    page.locator("#colour").get_by_role("option", name=name, exact=True).click()
    page.fill("#prompt textarea", "Is it far?")
    page.click("#send")
    page.wait_for_selector(f'#stage [data-side="steered"] .tt-foot:has-text("+1 {name}")')


def test_two_descriptions_become_a_vector_that_steers_the_chat(builder, open_page):
    """Catches descriptions that are swapped or lost on their way, or a Try that sets nothing."""
    page = open_page()
    build = BuildPage(page, f"{builder.page}{PATH}/")
    build.type("build-vector-name", "warmth")
    page.locator("#build-vector-source").get_by_label("two descriptions").check()
    build.tick("build-vector-calibrate", on=False)
    build.type("build-describe", "warm and kind")
    build.start()
    assert "what to move toward, and what away from" in build.problem()
    build.type("build-against", "cold and distant")
    build.start()
    assert "The vector warmth is built and stored" in build.end(within_ms=BUILD_MS)
    assert builder.card("warmth")["data"]["name"] == "warm and kind against cold and distant"
    assert "Not calibrated" in page.inner_text("#build-result")
    tried(page, "warmth")


def test_pasted_pairs_are_calibrated_and_their_unit_is_shown_and_tried(builder, open_page):
    """Catches a chosen unit that is not the vector's, a curve not drawn, a slider without zones."""
    page = open_page()
    build = BuildPage(page, f"{builder.page}{PATH}/")
    build.type("build-vector-name", "brightness")
    build.paste(FEW_PAIRS.replace('"build"', '"held"', 1))
    build.start()
    assert "too few pairs" in build.problem()
    build.paste(FEW_PAIRS)
    build.start()
    assert "The vector brightness is built and stored" in build.end(within_ms=BUILD_MS)
    card = builder.card("brightness")
    knee, curve = card["calibration"]["knee"], card["calibration"]["curve"]
    assert card["default_layers"] == knee["layers"]
    shown = page.inner_text("#build-result")
    assert f"{knee['dose']:.3f} of the hidden state's length at each" in shown
    n_sets = len(card["calibration"]["candidates"])
    assert f"from {n_sets} layer sets on 2 pairs." in shown
    assert page.locator("#build-result .tt-curve circle.tt-effect").count() == len(curve)
    assert page.locator("#build-result .tt-curve .tt-at-knee").count() == 1
    tried(page, "brightness")
    zones = page.locator('[data-key="vector-brightness"] ~ .tt-zones i')
    assert {zone.get_attribute("title") for zone in zones.all()} - {"unmeasured"}


def test_a_bundled_classifier_is_built_with_the_forms_own_values(open_page, toy_builder):
    """Catches a value that the form holds by itself and the server refuses."""
    page = open_page()
    build = BuildPage(page, f"{toy_builder.page}{PATH}/")
    page.locator("#build-kind").get_by_label("classifier").check()
    page.wait_for_selector("#build-bundled-about .tt-hint")
    build.type("build-classifier-name", "bundled")
    build.tick("build-classifier-calibrate", on=False)
    build.start()
    assert "The classifier bundled is built and stored" in build.end()
    assert page.locator("#build-result th").count()
    page.click("#build-try")
    page.wait_for_selector('[data-key^="label-bundled-"] >> nth=0', state="visible")

"""The Build tab in a real browser, before a server that answers what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from browser import keep_screenshot
from build_on_page import BuildPage
from fastapi import FastAPI
from page_before import page_before
from running_server import listening
from starlette.requests import Request
from starlette.responses import JSONResponse

from trimtab.ui.page.mount import PATH

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"
SCALES = [-1.0, 0.5, 1.0, 2.0, 4.0]
LAYERS = [[8], [10], [12], [10, 11, 12]]


def done_build() -> dict[str, Any]:
    """A vector's build with a map, whose problem was written by a stranger."""
    record = {
        "criteria": {"max_rise": 0.08},
        "n_pairs": 9,
        "candidates": [{"layers": layers, "dose": 0.1, "effect": 0.2} for layers in LAYERS],
        "curve": [{"scale": s, "margin": s / 5, "rise": s * s / 25} for s in (-1.0, 0.0, *SCALES)],
        "knee": {"layers": [10, 11, 12], "dose": 0.05, "is_clean": False, "problem": HOSTILE},
        "map": {
            "layers": LAYERS,
            "scales": SCALES,
            "dose": 0.05,
            "effect": [[s / 5 for s in SCALES]] * len(LAYERS),
            "rise": [[s * s / 25 for s in SCALES]] * len(LAYERS),
        },
    }
    return {
        "id": "build-1",
        "kind": "vector",
        "artifact": "warm",
        "status": "done",
        "stage": "storing",
        "done": 1,
        "total": 1,
        "position": 0,
        "elapsed_s": 3.0,
        "error": None,
        "result": {"id": "warm", "calibration": record, "default_layers": [10, 11, 12]},
    }


def told(builds: list[dict[str, Any]], *, refusal: str | None = None) -> FastAPI:
    """Return a server with these builds, or one that refuses to build."""
    app = FastAPI()
    example = {"preferred": "yes", "dispreferred": "no"}
    concept = {"id": "warm", "kind": "vector", "n_build": 4, "n_held": 2, "example": example}
    method = {"id": "mean", "is_default": True, "summary": "Sums.", "source": "A.", "options": {}}
    lists = {
        "models": [{"id": "toy"}],
        "steering/vectors": [],
        "steering/classifiers": [],
        "steering/presets": [],
        "steering/concepts": [concept],
        "steering/methods": [method],
        "steering/builds": builds,
    }

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"])
    async def answer(path: str, request: Request) -> JSONResponse:
        if path.startswith("steering/builds") and refusal:
            return JSONResponse(
                {"error": {"message": f"{request.method}: {refusal}"}}, status_code=501
            )
        if path == "steering/builds/build-1":
            return JSONResponse(builds[0])
        return JSONResponse({"object": "list", "data": lists[path]})

    return app


@pytest.fixture
def address_of() -> Iterator[Callable[[FastAPI], str]]:
    """Gives the address of the page of a server. Asked for before `open_page`, it ends after it."""
    with ExitStack() as running:

        def address(server: FastAPI) -> str:
            url, _ = running.enter_context(listening(server))
            return running.enter_context(page_before(url)) + PATH + "/"

        yield address


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_what_was_measured_is_drawn_at_any_width(address_of, open_page, width, is_dark):
    """Catches maps that make the page scroll sideways, a lost knee, and text that is obeyed."""
    url = address_of(told([done_build()]))
    page = open_page(width=width, is_dark=is_dark)
    BuildPage(page, url)
    page.click("#build-which input")
    page.get_by_role("option", name="vector warm: done").click()
    page.wait_for_selector("#build-result .tt-grid")
    knees = page.locator("#build-result .tt-maps .tt-knee")
    assert knees.all_inner_texts() == ["◆+0.20", "◆+4%"]
    outline = knees.first.evaluate("at => getComputedStyle(at).outlineStyle")
    assert outline == "solid"
    assert f"Not clean: {HOSTILE}" in page.inner_text("#build-result")
    for name in ("Cancel", "Try it in Chat", "Download", "Export GGUF"):
        assert page.get_by_role("button", name=name, exact=True).is_visible()
    keep_screenshot(page, "build")
    drawn = page.locator("#build-result svg").bounding_box()
    assert drawn is not None
    assert 0 <= drawn["x"] <= drawn["x"] + drawn["width"] <= width


def test_a_server_that_cannot_build_says_so(address_of, open_page):
    """Catches a tab that looks ready on an engine that has the model elsewhere."""
    url = address_of(told([], refusal="This engine cannot build with the model."))
    build = BuildPage(open_page(), url)
    assert "GET: This engine cannot build" in build.problem()
    build.start()
    assert "POST: This engine cannot build" in build.problem()

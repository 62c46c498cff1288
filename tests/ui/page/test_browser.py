"""The browser tests' own guard: a page that complains or calls out fails its test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from browser import guarded_pages

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

HERE = "http://localhost/"
FAR = "http://192.0.2.1/pixel.png"  # an address that belongs to nobody (RFC 5737)


def show(page: Page, html: str) -> Page:
    """Open a page of this text, at an address that the browser takes for a server's."""
    page.route(HERE, lambda route: route.fulfill(body=html, content_type="text/html"))
    page.goto(HERE)
    return page


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        (f"<img src='{FAR}'>", f"left this machine: {FAR}"),
        ("<link rel=stylesheet href='https://fonts.example/a.css'>", "left this machine: https"),
        ("<script>new WebSocket('ws://192.0.2.1/live')</script>", "left this machine: ws:"),
        ("<script>fetch('//127.0.0.1.example/')</script>", "left this machine: http"),
        ("<script>console.error('broken thing')</script>", "logged: broken thing"),
        ("<script>throw new Error('broken thing')</script>", "uncaught: .*broken thing"),
        ("<script>Promise.reject(new Error('broken'))</script>", "uncaught: .*broken"),
    ],
)
def test_a_page_that_misbehaves_fails(chromium, html, complaint):
    """Catches a guard that lets a font from elsewhere or an error in the console pass."""
    with pytest.raises(AssertionError, match=complaint), guarded_pages(chromium) as open_page:
        show(open_page(), html)


def test_a_good_page_passes(open_page):
    """Catches a guard that forbids what pages do: local scripts, pictures in them, warnings."""
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    script = "console.warn('careful'); fetch(URL.createObjectURL(new Blob(['x']))).then(() => {})"
    page = show(open_page(), f"<p>well</p><img src='{dot}'><script>{script}</script>")
    assert page.inner_text("p") == "well"


def test_what_a_test_provokes_is_allowed_by_name(chromium):
    """Catches an allowed error that hides the others."""
    html = "<script>console.error('the first'); console.error('the second')</script>"
    with pytest.raises(AssertionError) as caught, guarded_pages(chromium) as open_page:
        show(open_page(may_log=("the first",)), html)
    assert "the second" in str(caught.value)
    assert "the first" not in str(caught.value)


def test_two_people_share_nothing(open_page):
    """Catches two pages of one person where a test wants two people."""
    html = "<script>localStorage.n = 1 + Number(localStorage.n || 0)</script>"
    for page in (open_page(width=390, is_dark=True), open_page(width=1280)):
        show(page, html)
        assert page.evaluate("localStorage.n") == "1"


def test_width_and_colours_are_the_persons(open_page):
    """Catches a dark or a narrow test that looks at the light, wide page."""
    page = open_page(width=390, is_dark=True)
    assert page.evaluate("innerWidth") == 390
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    page = open_page(width=1280, is_dark=False)
    assert page.evaluate("innerWidth") == 1280
    assert not page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.slow
def test_the_real_server_is_there(open_page, served_page):
    """Catches a server that other tests would wait for, or one without its vectors."""
    page = open_page()
    page.goto(f"{served_page.url}/health")
    assert '"status":"ok"' in page.inner_text("body")
    assert "formal, optimistic" in served_page.log

"""The page alone, for a server that runs elsewhere and asks for keys."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import keep_screenshot
from chat_on_page import PATIENCE_MS
from page_before import page_before
from running_server import NAME, Served, running
from serving_fakes import FakeEngine, model_ref, toy_vector

from trimtab.serving.settings import ServerSettings
from trimtab.steering.store import Store
from trimtab.ui.page.mount import PATH

# A page is asked for after the servers it speaks to, so that it is closed before they end.
pytestmark = pytest.mark.browser

KEY, ADMIN = "a-secret", "the-admins"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Served]:
    """A server that asks for a key, and for an admin's; its engine says letters."""
    store = Store(tmp_path / "store")
    store.put_vector(toy_vector("warm", ref=model_ref()))
    settings = ServerSettings(served_model_name=NAME, api_keys=(KEY,), admin_keys=(ADMIN,))
    with running(
        FakeEngine(), store, settings=settings, headers={"authorization": f"Bearer {KEY}"}
    ) as served:
        yield served


@pytest.fixture
def alone(keyed: Served) -> Iterator[str]:
    """The page's address."""
    with page_before(keyed.url) as address:
        yield address + PATH


def test_a_key_is_its_visitors_own(keyed, alone, open_page):
    """Catches a key that one visitor enters and all others then use, or that stands in the page."""
    page = open_page()
    page.goto(alone)
    page.wait_for_selector("#server-key input")
    page.fill("#server-key input", "wrong")
    page.click("#use-key")
    page.wait_for_selector("#notice .tt-problem")
    assert "not one of this server's" in page.inner_text("#notice")
    page.fill("#server-key input", KEY)
    page.click("#use-key")
    page.wait_for_selector('[data-key="vector-warm"]')
    assert NAME in page.inner_text("#title")
    page.click("#send")
    page.wait_for_selector('#stage [data-side="steered"] .tt-answer span')
    assert KEY not in page.content()
    other = open_page()
    other.goto(alone)
    other.wait_for_selector("#server-key input")
    assert other.locator('[data-key="vector-warm"]').count() == 0


def enter(page, key: str) -> None:
    """Give a key, and wait until it is taken."""
    page.fill("#server-key input", key)
    page.click("#use-key")
    page.wait_for_selector("#another-key", state="visible")


def test_what_needs_an_admin_key_says_so_and_takes_it(keyed, alone, open_page):
    """Catches a refusal that leaves a visitor without a way, or shows nothing at all."""
    page = open_page(width=390)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(alone)
    page.wait_for_selector("#server-key input")
    enter(page, KEY)
    keep_screenshot(page, "another-key")
    remedy = "needs an admin key: send one of the admin keys. Here, give it under “Another key”"
    page.get_by_role("tab", name="Build").click()
    page.wait_for_selector("#build-concept-example .tt-hint")
    page.click("#build-start")
    page.locator("#build-notice", has_text=remedy).wait_for()
    page.get_by_role("tab", name="Library").click()
    page.get_by_role("button", name="warm", exact=True).click()
    page.click("#library-delete")
    page.get_by_role("button", name="Delete the vector warm").click()
    page.locator("#library-notice", has_text=remedy).wait_for()
    assert [vector.id for vector in keyed.store.vectors()] == ["warm"]
    page.click("#another-key")
    page.wait_for_selector("#server-key input")
    assert page.input_value("#server-key input") == ""
    enter(page, ADMIN)
    page.click("#library-delete")
    page.get_by_role("button", name="Delete the vector warm").click()
    page.locator("#library-notice", has_text="Deleted the vector warm.").wait_for()
    assert keyed.store.vectors() == []


def test_a_server_that_is_gone_is_a_sentence(keyed, alone, open_page):
    """Catches a page that hangs, or shows a traceback, when its server ends."""
    keyed.server.should_exit = True
    end = time.monotonic() + 30
    while keyed.server.started and not keyed.server.force_exit:
        try:
            socket.create_connection(("127.0.0.1", int(keyed.url.rpartition(":")[2])), 1).close()
        except OSError:
            break
        assert time.monotonic() < end
        time.sleep(0.01)
    page = open_page()
    page.goto(alone)
    page.wait_for_selector("#notice .tt-problem")
    assert "cannot be reached" in page.inner_text("#notice")
    assert "trimtab serve" in page.inner_text("#notice")

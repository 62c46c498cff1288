"""The page's Build tab as a person uses it: fill in, build, watch, cancel, try."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

# The real model on two busy cores.
PATIENCE_MS = 90_000
THINGS = ("rain", "tea", "trains", "music", "winter", "chess", "books", "bread", "stars", "cities")
PAIRS = "\n".join(
    f"What do you think of {thing}? || I love {thing}, how bright! || I hate {thing}, how dull."
    for thing in (*THINGS, "gardens", "oceans", "dogs", "snow")
)


class BuildPage:
    """One person's Build tab.

    Args:
        page: a fresh one.
        url: the page's.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        self.open()

    def open(self) -> None:
        """Go to the tab and wait until it says what there is to build from."""
        self.page.wait_for_selector("#title p")
        self.page.get_by_role("tab", name="Build").click()
        self.page.wait_for_selector("#build-concept-example .tt-hint")

    def type(self, field: str, text: str) -> None:
        """Fill in a field."""
        self.page.locator(f"#{field}").locator("input, textarea").first.fill(text)

    def tick(self, field: str, *, on: bool = True) -> None:
        """Set a box."""
        self.page.locator(f"#{field} input").set_checked(on)

    def paste(self, text: str) -> None:
        """Choose pairs of one's own, and paste them."""
        self.page.locator("#build-vector-source").get_by_label("my pairs").check()
        self.type("build-pairs", text)

    def start(self) -> None:
        """Press Build. What was wrong before is marked, so that it is not taken for an answer."""
        self.page.evaluate(
            "document.querySelector('#build-notice .tt-problem')?.setAttribute('data-old', '')"
        )
        self.page.click("#build-start")

    def problem(self) -> str:
        """Wait for what is wrong."""
        self.page.wait_for_selector("#build-notice .tt-problem:not([data-old])")
        return self.page.inner_text("#build-notice")

    def end(self, *, within_ms: float = PATIENCE_MS) -> str:
        """Wait for how a build ended.

        Raises:
            AssertionError: it never began.
        """
        problem = "#build-notice .tt-problem:not([data-old])"
        self.page.wait_for_selector(f"#build-end .tt-notice, {problem}", timeout=within_ms)
        assert not self.page.locator(problem).count(), self.page.inner_text(problem)
        return self.page.inner_text("#build-end")

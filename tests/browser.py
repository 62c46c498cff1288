"""Pages in a real browser, which may speak to this machine alone and must not complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-default-apps",
    "--disable-features=OptimizationHints,MediaRouter",
    # Whatever else it wants to reach, it finds no address: sockets, workers, its own services.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
LOOPBACK = {"127.0.0.1", "localhost"}
HEIGHT = 900
SCREENSHOTS = Path("build/screenshots")

OpenPage = Callable[..., "Page"]


def executable() -> str | None:
    """Return the path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless browser.

    While it runs, this thread's `asyncio.run` refuses: playwright keeps a running event loop in
    it. So a browser lasts for a module, and what needs a loop is tested in another one.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = executable()
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def guarded_pages(browser: Browser) -> Iterator[OpenPage]:
    """Give a function that opens a page for a new person, and fail at the end if one misbehaved.

    The function's arguments, all by name, are `width` (CSS pixels), `is_dark` (what the person's
    system prefers) and `may_log` (parts of errors that this test provokes on purpose).

    Raises:
        AssertionError: a page asked for something outside of this machine, logged an error or
            left an exception uncaught.
    """
    visits: list[Visit] = []

    def open_page(
        *, width: int = 1280, is_dark: bool = False, may_log: tuple[str, ...] = ()
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": HEIGHT},
            color_scheme="dark" if is_dark else "light",
            service_workers="block",  # their requests are not routed
        )
        visits.append(Visit(context, may_log))
        return context.new_page()

    try:
        yield open_page
    finally:
        for visit in visits:
            visit.end()
    problems = [problem for visit in visits for problem in visit.problems]
    assert not problems, "\n".join(problems)


def keep_screenshot(page: Page, name: str) -> None:
    """Write the whole page to build/screenshots, its width and colours in the file's name.

    Raises:
        AssertionError: it scrolls sideways, so the picture would not show all of it.
    """
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    is_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"{name}-{width}-{'dark' if is_dark else 'light'}.png"
    page.screenshot(path=file, full_page=True)


class Visit:
    """One person's cookies, storage and pages, and what went wrong in them.

    Args:
        context: a fresh one.
        may_log: parts of the error messages that are no problem here.
    """

    def __init__(self, context: BrowserContext, may_log: tuple[str, ...]) -> None:
        self.context = context
        self.may_log = may_log
        self.problems: list[str] = []
        context.route("**", self._route)
        context.on("page", lambda page: page.on("websocket", lambda it: self._is_near(it.url)))
        context.on("console", self._console)
        context.on("weberror", lambda error: self._log(f"uncaught: {error.error}"))

    def end(self) -> None:
        """Hear what the pages have still to say, and close them."""
        for page in self.context.pages:
            # An answer comes after every event before it.
            page.evaluate("0")
        self.context.close()

    def _route(self, route: Route) -> None:
        if self._is_near(route.request.url):
            route.continue_()
        else:
            route.abort()

    def _is_near(self, url: str) -> bool:
        parts = urlsplit(url)
        is_near = parts.scheme in {"data", "blob"} or parts.hostname in LOOPBACK
        if not is_near:
            self.problems.append(f"left this machine: {url}")
        return is_near

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._log(f"logged: {message.text} ({message.location.get('url', '')})")

    def _log(self, problem: str) -> None:
        if not any(part in problem for part in self.may_log):
            self.problems.append(problem)

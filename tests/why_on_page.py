"""The page's Why tab as a person uses it: choose, explain, read off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chat_on_page import ChatPage

from trimtab.ui.page.run_settings import read_settings, to_link
from trimtab.ui.page.why_question import TYPED

if TYPE_CHECKING:
    from playwright.sync_api import Page

PROMPT = "What is a tree?"
STEERING = {"vectors": [{"id": "optimistic", "scale": 2.0}]}
IS_OVER = (
    "!document.querySelector('#why-progress progress') && "
    "document.querySelector('#why-result .tt-why:not([data-old]), "
    "#why-notice .tt-notice:not([data-old])')"
)


class WhyPage:
    """One person's Why tab, with an answer to explain if they asked something before."""

    def __init__(self, page: Page, url: str, *, asks: bool = True) -> None:
        settings = read_settings({"prompt": PROMPT, "max_tokens": 8, **STEERING})
        self.chat = ChatPage(page, url, query=f"?run={to_link(settings)}")
        self.page = page
        if asks:
            self.chat.send()
            self.chat.wait()
        page.get_by_role("tab", name="Why").click()
        page.wait_for_selector("#why-explain")

    def choose(self, method: str, options: str = "") -> None:
        self.page.click("#why-method input")
        self.page.get_by_role("option", name=method, exact=True).click()
        if options:
            if not self.page.is_visible("#why-options :is(input, textarea)"):
                self.page.click("#why-more button")
            self.page.fill("#why-options :is(input, textarea)", options)

    def type(self, prompt: str, preferred: str, dispreferred: str) -> None:
        self.page.get_by_label(TYPED, exact=True).check()
        for name, text in zip(
            ("prompt", "preferred", "dispreferred"), (prompt, preferred, dispreferred), strict=True
        ):
            self.page.fill(f"#why-{name} textarea", text)

    def begin(self) -> None:
        """Click, and wait until the server has read something."""
        self.page.click("#why-explain")
        self.page.wait_for_function(
            "(document.querySelector('#why-progress progress[value]') || {}).value > 0"
        )

    def explain(self) -> str:
        """Click, and wait for the end; returns what is said beside the result."""
        self.page.evaluate(
            "document.querySelectorAll('#why-result .tt-why, #why-notice .tt-notice')"
            ".forEach(shown => { shown.dataset.old = 'yes' })"
        )
        self.page.click("#why-explain")
        self.page.wait_for_function(IS_OVER)
        return self.said()

    def said(self) -> str:
        """What is said beside the result."""
        return "\n".join(self.page.locator("#why-notice .tt-notice").all_inner_texts())

    def table(self) -> list[list[str]]:
        """Every token's row: index, token, id, kind, scores."""
        rows: list[list[str]] = self.page.evaluate(
            "[...document.querySelectorAll('#why-result .tt-figures tr')].slice(1)"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )
        return rows

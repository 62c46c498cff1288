"""The page's Chat tab as a person uses it: open, choose, send, read, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

IS_OVER = "document.querySelectorAll('#stage [aria-busy]').length == 0"
# The real model on two busy cores.
PATIENCE_MS = 90_000


def sees_both_sides(page: Page, url: str, *, query: str) -> None:
    """Send what a link asks, under `optimistic` at 2, and look at both answers while they come.

    Raises:
        AssertionError: a side came in one piece, both are the same, or the steered one's receipt
            or a gauge is missing.
    """
    page.add_init_script(
        "window.seen = {baseline: [], steered: []}; new MutationObserver(() => {"
        "for (const side in window.seen) { const at = document.querySelector("
        "`#stage [data-side=${side}] .tt-answer`); "
        "if (at) window.seen[side].push(at.innerText.length) } })"
        ".observe(document, {subtree: true, childList: true, characterData: true})"
    )
    chat = ChatPage(page, url, query=query)
    chat.send()
    chat.wait()
    for side, lengths in page.evaluate("window.seen").items():
        assert len(set(lengths)) >= 4, (side, lengths)
    assert chat.text("baseline") != chat.text("steered")
    steered = page.inner_text('#stage [data-side="steered"]')
    assert "+2 optimistic at layer" in steered
    assert "tokens steered" in steered
    gauges = page.inner_text("#gauges")
    for shown in ("Repetition", "nats (own", "Dose up to 0."):
        assert shown in gauges, gauges


class ChatPage:
    """One person's Chat tab.

    Args:
        page: a fresh one.
        url: the server's.
        query: of the page's address, such as `?run=...`.
    """

    def __init__(self, page: Page, url: str, *, query: str = "") -> None:
        self.page = page
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{url}/ui/{query}")
        page.wait_for_selector("#steering-panel fieldset")

    def text(self, side: str) -> str:
        """The last answer of `baseline` or `steered`, as far as it came."""
        answer = self.page.locator(f'#stage [data-side="{side}"] .tt-answer')
        return answer.inner_text() if answer.count() else ""

    def choose(self, **settings: Any) -> None:
        """Fill in sampling and prompt."""
        if "prompt" in settings:
            self.page.fill("#prompt textarea", settings["prompt"])
        if "max_tokens" in settings:
            if not self.page.is_visible("#max-tokens input"):
                self.page.click("#sampling button")
            self.page.fill("#max-tokens input", str(settings["max_tokens"]))
            self.page.locator("#max-tokens input").blur()

    def slide(self, vector: str, presses: str) -> None:
        """Press a key on a vector's slider."""
        self.page.locator(f'[data-key="vector-{vector}"]').press(presses)

    def send(self) -> None:
        """Send the prompt and wait for the first words of both sides.

        A problem shown before is none of this prompt's, and goes with its first words.

        Raises:
            AssertionError: the page shows a problem instead.
        """
        from playwright.sync_api import TimeoutError as TooLateError

        turn = int(self.page.get_attribute("#stage [data-turn]", "data-turn") or 0)
        problem = self.page.locator("#chat-notice .tt-problem")
        self.page.click("#send")
        try:
            self.page.wait_for_function(
                "n => document.querySelector('#stage [data-turn]').dataset.turn > n && "
                "['baseline', 'steered'].every(side => document.querySelector("
                "`#stage [data-side=${side}] .tt-answer`)?.innerText.trim())",
                arg=turn,
            )
        except TooLateError as error:
            raise AssertionError(problem.all_inner_texts()) from error
        assert not problem.count(), problem.all_inner_texts()

    def wait(self) -> None:
        """Wait until nothing streams any more."""
        self.page.wait_for_function(IS_OVER)

"""Take the README's picture, docs/page.png: a real server, a real answer, a real browser.

    PYTHONSAFEPATH=1 PYTHONPATH=tests:benchmarks python docs/regenerate_page_picture.py

Needs the vector `optimistic` (`trimtab vectors build --concept optimistic`) and a Chromium.
"""

from __future__ import annotations

from pathlib import Path

from browser import chromium
from chat_on_page import ChatPage
from page import served

from trimtab.ui.page.run_settings import read_settings, to_link

FILE = Path(__file__).resolve().parent / "page.png"
SETTINGS = {
    "prompt": "What will our town be like in fifty years?",
    "vectors": [{"id": "optimistic", "scale": -1.0}],
    "probes": ["optimistic"],
    "max_tokens": 70,
}


def main() -> None:
    """Write docs/page.png."""
    with chromium() as browser, served(None, "smollm2") as (url, _):
        context = browser.new_context(
            viewport={"width": 1280, "height": 760}, color_scheme="light", device_scale_factor=1
        )
        chat = ChatPage(context.new_page(), url, query=f"?run={to_link(read_settings(SETTINGS))}")
        chat.send()
        chat.wait()
        chat.page.click("#colour input")
        chat.page.locator("li[role=option]", has_text="optimistic").click()
        chat.page.wait_for_selector('#stage .tt-answer span[style*="--tt-"]')
        chat.page.locator("li[role=option]").first.wait_for(state="detached")
        chat.page.mouse.move(0, 0)
        chat.page.screenshot(path=FILE)
        context.close()


if __name__ == "__main__":
    main()

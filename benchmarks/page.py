"""How long a person waits on the page: first paint, a usable panel, and a slider's first token.

    export PYTHONSAFEPATH=1 PYTHONPATH=tests     # the browser is the tests' (tests/browser.py)
    python benchmarks/page.py                    # starts its own server of smollm2
    python benchmarks/page.py --url http://127.0.0.1:8000 --vector optimistic

The server is `trimtab serve`, the browser an installed Chromium, headless. The first visit comes
right after the server says that it is ready, with nothing in any cache; the others are new people
in the same browser. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from browser import chromium

ANSWER = "#stage [data-side=steered] .tt-answer"
READY = re.compile(r"Ready: (\S+)/v1")


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; one is started otherwise")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--vector", default="optimistic", help="a stored vector to slide")
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--moves", type=int, default=9)
    options = parser.parse_args()
    with chromium() as browser, served(options.url, options.model) as (url, ready):
        visits = [
            visit(browser, url, since=ready if i == 0 else None) for i in range(options.visits)
        ]
        moves = slider(browser, url, vector=options.vector, n=options.moves)
    found = {
        "first_visit": visits[0],
        "later_visits": {
            name: round(statistics.median(v[name] for v in visits[1:]), 2) for name in visits[0]
        },
        "slider_to_first_token_s": {
            "median": round(statistics.median(moves), 2),
            "worst": round(max(moves), 2),
            "n": len(moves),
        },
    }
    print(json.dumps(found, indent=2))


@contextmanager
def served(url: str | None, model: str) -> Iterator[tuple[str, float]]:
    """Yield a server's address and when it became ready."""
    if url is not None:
        yield url, time.perf_counter()
        return
    command = [sys.executable, "-m", "trimtab.ui.cli", "serve", model, "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as it:
        assert it.stderr is not None
        try:
            for line in it.stderr:
                if at := READY.search(line):
                    yield at[1], time.perf_counter()
                    break
            else:
                raise SystemExit("The server ended before it was ready.")
        finally:
            it.send_signal(signal.SIGINT)
            it.stderr.read()


def visit(browser: Any, url: str, *, since: float | None) -> dict[str, float]:
    """Return the seconds until a new person sees something, and until the panel can be used.

    Args:
        browser: playwright's.
        url: the server's.
        since: count from this moment and not from the click.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    clicked = time.perf_counter()
    page.goto(f"{url}/ui")
    page.wait_for_selector("#steering-panel fieldset")
    usable = time.perf_counter() - (since or clicked)
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    # The browser's clock of a page starts with its navigation.
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    before = clicked - since if since else 0.0
    context.close()
    return {"first_paint_s": round(before + paint / 1000, 2), "panel_usable_s": round(usable, 2)}


def slider(browser: Any, url: str, *, vector: str, n: int) -> list[float]:
    """Return the seconds from each move of a slider to the new answer's first token on the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{url}/ui")
    page.wait_for_selector("#steering-panel fieldset")
    if not page.locator(f'[data-key="vector-{vector}"]').count():
        page.select_option('[data-key="add-vector"]', vector)
    page.click("#send")
    is_over = "document.querySelectorAll('#stage [aria-busy]').length == 0"
    page.wait_for_function(f"document.querySelector('{ANSWER}')?.innerText.trim() && {is_over}")
    moves = []
    for i in range(n):
        # The time of the move and of the first new words are both the page's own.
        page.evaluate(
            """([answer]) => {
              window.waited = null;
              const began = performance.now();
              const old = document.querySelector(answer).innerText;
              const look = new MutationObserver(() => {
                const now = document.querySelector(answer)?.innerText || '';
                if (now.trim() && now !== old && now.length < old.length) {
                  window.waited = performance.now() - began; look.disconnect();
                }
              });
              look.observe(document.querySelector('#stage'),
                {subtree: true, childList: true, characterData: true});
            }""",
            [ANSWER],
        )
        page.locator(f'[data-key="vector-{vector}"]').press("ArrowLeft" if i % 2 else "ArrowRight")
        page.wait_for_function("window.waited !== null")
        moves.append(page.evaluate("window.waited") / 1000)
        page.wait_for_function(is_over)
    context.close()
    return moves


if __name__ == "__main__":
    main()

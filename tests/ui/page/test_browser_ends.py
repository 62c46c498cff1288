"""What a browser leaves behind in the process that drove it."""

from __future__ import annotations

import asyncio

import browser
import pytest


@pytest.mark.browser
def test_event_loops_run_after_a_browser() -> None:
    """Catches a browser that lasts longer than its module: every later asyncio.run would refuse."""

    async def one() -> int:
        return 1

    assert asyncio.run(one()) == 1
    with browser.chromium() as started:
        started.new_page().goto("about:blank")
    assert asyncio.run(one()) == 1

"""What the page's tests share: a browser, people who open pages in it, and the real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import browser
import pytest
from served_program import ServedProgram, serving

from trimtab.steering.store import Store, model_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Where vLLM's tests run there is neither.
for needed in ("gradio", "playwright"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless browser. Tests that use it are marked `browser`, and run no event loop."""
    with browser.chromium() as started:
        yield started


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[browser.OpenPage]:
    """Opens a page for a new person; the test fails if one complains or leaves this machine."""
    with browser.guarded_pages(chromium) as open_page:
        yield open_page


@pytest.fixture(scope="session")
def served_page(
    real_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedProgram]:
    """`trimtab serve smollm2`, with the vectors and the classifier of `real_store` as its own.

    In float32: in bfloat16 a batch-mate's rounding changes which of two tokens is the likelier, and
    tests compare answers that had one with answers that had none.
    """
    home = tmp_path_factory.mktemp("served")
    shutil.copytree(real_store.folder, model_folder(home, "smollm2"))
    with serving("smollm2", "--dtype", "float32", TRIMTAB_HOME=str(home)) as served:
        yield served

"""The page before the vLLM engine, which runs in an environment of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_on_page import BuildPage
from chat_on_page import sees_both_sides
from page_before import page_before
from served_program import serving
from why_on_page import PROMPT, STEERING, WhyPage

from trimtab.steering.store import Store, model_folder
from trimtab.ui.page.mount import PATH
from trimtab.ui.page.run_settings import read_settings, to_link

VLLM = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason="there is no .venv-vllm (make vllm)"),
]


@pytest.fixture(scope="module")
def page_url(real_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address, before `trimtab serve smollm2 --engine vllm` with `real_store`.

    The environment holds no Gradio. The settings that fit a small machine are the Makefile's.
    """
    home = tmp_path_factory.mktemp("vllm-home")
    shutil.copytree(real_store.folder, model_folder(home, "smollm2"))
    flags = ("--engine", "vllm", "--no-page", "--dtype", "float32", "--enforce-eager")
    with (
        serving("smollm2", *flags, python=str(VLLM), TRIMTAB_HOME=str(home)) as served,
        page_before(served.url) as address,
    ):
        yield address


def test_both_answers_stream_with_their_receipt_and_surprise(open_page, page_url):
    """Catches a page that needs something of the server that only the embedded engine does."""
    settings = read_settings({"prompt": PROMPT, "max_tokens": 24, **STEERING})
    sees_both_sides(open_page(), page_url, query=f"?run={to_link(settings)}")


def test_what_vllm_cannot_do_is_said(open_page, page_url):
    """Catches a tab that hangs, or shows a traceback, where there is no attribution or build."""
    why = WhyPage(open_page(), page_url, asks=False)
    why.type("Is it?", "Yes", "No")
    assert "cannot attribute; serve the model with --engine transformers" in why.explain()
    assert why.page.locator("#why-result .tt-why").count() == 0
    build = BuildPage(open_page(), f"{page_url}{PATH}/")
    sentence = "cannot build with it. Build with `trimtab vectors build`"
    assert sentence in build.problem()
    build.type("build-vector-name", "warm")
    build.start()
    assert sentence in build.problem()

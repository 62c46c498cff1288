"""README's Python and curl blocks run as they stand, against a real server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README) if kind == language]


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text, real_server):
    """Catches an example that no longer works."""
    program = text.replace("http://127.0.0.1:8000", real_server.url)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("text", blocks("bash"))
def test_curl_blocks_run(text, real_server):
    """Catches a request in the README that the server refuses."""
    command = text.replace("http://127.0.0.1:8000", real_server.url)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"steering"' in done.stdout, done.stdout
    assert '"error"' not in done.stdout


def test_named_files_exist():
    """Catches a link or a path in the prose that points nowhere."""
    for name in (
        "README.md",
        "ARCHITECTURE.md",
        "docs/attribution.md",
        "docs/classifiers.md",
        "docs/scaling.md",
        "docs/steering.md",
        "docs/vectors.md",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"
        for path in re.findall(r"`([a-z_]+/[a-z_./]+\.(?:py|md|jsonl))`", text):
            assert (ROOT / path).exists(), f"{name} names {path}"

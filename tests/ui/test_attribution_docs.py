"""docs/attribution.md says what is there, and what it shows is what comes out."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"```console\n\$ trimtab (.*?)\n```\n```text\n(.*?)```", re.DOTALL)


def test_methods_are_the_registrys():
    """Catches a method, an option or a default that the table does not know."""
    spec = importlib.util.spec_from_file_location(
        "regenerate_methods", ROOT / "docs" / "regenerate_methods.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.with_table(TEXT) == TEXT, "run: python docs/regenerate_methods.py"


def test_markers_are_there():
    """Catches a table that cannot be written any more because its place is gone."""
    for marker in ("<!-- methods -->\n", "<!-- /methods -->\n"):
        assert TEXT.count(marker) == 1


@pytest.mark.slow
def test_first_example_is_what_comes_out(trimtab, smollm2, monkeypatch):
    """Catches an example whose output has changed."""
    monkeypatch.setattr("trimtab.ui.attributed_model.load_model", lambda *a, **k: smollm2)
    monkeypatch.setattr("trimtab.ui.server_log.quiet_start", lambda: None)
    command, shown = EXAMPLE.findall(TEXT)[0]
    done = trimtab(*shlex.split(command))
    assert done.code == 0, done.err
    # Other processors round otherwise: the strongest words, the sentences without their numbers.
    assert strongest(done.out) == strongest(shown)
    assert without_numbers(done.out) == without_numbers(shown)


def strongest(text: str) -> list[str]:
    rows = [line for line in text.splitlines() if "█" in line]
    return [row.rpartition("  ")[2] for row in rows[:3]]


def without_numbers(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if "|" not in line]
    return re.sub(r"[-+]?\d+(\.\d+)?", "0", " ".join(lines)).split()


@pytest.mark.slow
def test_python_example_runs(smollm2, monkeypatch, capsys):
    """Catches an example that no longer works, or gives France no weight."""
    monkeypatch.setattr("trimtab.steering.model.loading.load_model", lambda *a, **k: smollm2)
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(program, "docs/attribution.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    scores = {line.rpartition(" ")[0].strip(): float(line.split()[-1]) for line in lines}
    assert max(scores, key=scores.__getitem__) == "' France'"

"""What the command line's tests share: a home of their own, stored vectors, and a toy on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_program import Done
from toy_chat import toy_chat

from trimtab.steering.model.paths import data_home
from trimtab.steering.store import Store, model_folder
from trimtab.ui.cli import run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for vectors, and a plain environment."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("TRIMTAB_DEBUG", "NO_COLOR", "TRIMTAB_API_KEYS", "TRIMTAB_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def trimtab(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line in this process."""

    def command(*args: str) -> Done:
        capsys.readouterr()
        code = run(list(args))
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return command


@pytest.fixture
def store(home: Path) -> Store:
    """The default model's store."""
    return Store(model_folder(data_home(), "smollm2"))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model in Hugging Face's layout, which every command can load in a moment."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy = toy_chat()
    toy.model.save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four pairs that the toy can tell apart by their letters."""
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    rows = [
        {
            "prompt": f"Say {i}",
            "preferred": f"aaa {i} abab",
            "dispreferred": f"zzz {i} xyxy",
            "split": "held" if i % 3 == 0 else "build",
        }
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path

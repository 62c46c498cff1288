"""The bundled questions and text that have nothing to do with any concept."""

from __future__ import annotations

import json
from importlib import resources


def neutral_questions(*, split: str = "build") -> list[str]:
    """Return the bundled questions that any style can answer."""
    folder = resources.files("trimtab.training.vectors") / "prompts"
    lines = (folder / "neutral_questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["prompt"] for row in rows if row["split"] == split]


def neutral_text() -> str:
    """Return the bundled text on which damage is measured."""
    folder = resources.files("trimtab.training.vectors") / "prompts"
    return (folder / "neutral_text.txt").read_text(encoding="utf-8")

"""The questions that benchmarks of attribution ask: none of them was used to build anything.

TruthfulQA's last quarter, every fourth question of it: 52. F is the summed log-probability of the
correct answer over the first false one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt, prompt_from_messages
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model

Question = tuple[str, str, str]


def questions() -> list[Question]:
    """Return (question, correct answer, false answer) of each."""
    data = os.environ.get("TRIMTAB_DATA")
    if not data:
        sys.exit("TRIMTAB_DATA must name the folder that holds truthfulqa/mc_task.json")
    rows = json.loads((Path(data) / "truthfulqa" / "mc_task.json").read_text())
    found = []
    for row in rows[3 * len(rows) // 4 :: 4]:
        answers = row["mc1_targets"]
        right = next(a for a, is_right in answers.items() if is_right)
        wrong = next(a for a, is_right in answers.items() if not is_right)
        found.append((row["question"], right, wrong))
    return found


def asked(subject: Subject, item: Question) -> tuple[Prompt, Objective]:
    """Return a question in the model's chat template, and its two answers."""
    question, right, wrong = item
    prompt = prompt_from_messages(subject.tokenizer, [{"role": "user", "content": question}])
    preferred, dispreferred = (
        tuple(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (right, wrong)
    )
    return prompt, Objective(preferred, dispreferred)


def default_subject(*, dtype: str = "float32", slice_tokens: int | None = None) -> Subject:
    """Return the default model."""
    loaded = load_model("smollm2", dtype=dtype)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    return Subject(loaded, profile, slice_tokens=slice_tokens)

"""The questions that benchmarks of attribution ask: none of them was used to build anything.

TruthfulQA's last quarter, every fourth question of it: 52. F is the summed log-probability of the
correct answer over the first false one. `continuations` are a second set, of longer prompts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt, prompt_from_messages, prompt_from_text
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model

Question = tuple[str, str, str]


def questions() -> list[Question]:
    """Return (question, correct answer, false answer) of each."""
    rows = json.loads((_data() / "truthfulqa" / "mc_task.json").read_text())
    found = []
    for row in rows[3 * len(rows) // 4 :: 4]:
        answers = row["mc1_targets"]
        right = next(a for a, is_right in answers.items() if is_right)
        wrong = next(a for a, is_right in answers.items() if not is_right)
        found.append((row["question"], right, wrong))
    return found


def continuations() -> list[Question]:
    """Return (40 words, the 8 that follow, 8 that follow elsewhere) of WikiText-2's validation.

    50 paragraphs, evenly spaced among those of 60 words and more; the false words are those of the
    next paragraph taken.
    """
    text = (_data() / "wikitext2" / "valid.txt").read_text()
    paragraphs = [words for line in text.splitlines() if len(words := line.split()) >= 60]
    taken = paragraphs[:: len(paragraphs) // 50][:50]
    follow = [" " + " ".join(words[40:48]) for words in taken]
    return [
        (" ".join(words[:40]), follow[i], follow[(i + 1) % len(follow)])
        for i, words in enumerate(taken)
    ]


def asked(subject: Subject, item: Question, *, is_chat: bool = True) -> tuple[Prompt, Objective]:
    """Return a question in the model's chat template, or as it stands, and its two answers."""
    question, right, wrong = item
    if is_chat:
        prompt = prompt_from_messages(subject.tokenizer, [{"role": "user", "content": question}])
    else:
        prompt = prompt_from_text(subject.tokenizer, question)
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


def _data() -> Path:
    data = os.environ.get("TRIMTAB_DATA")
    if not data:
        sys.exit("TRIMTAB_DATA must name the folder that holds truthfulqa and wikitext2")
    return Path(data)

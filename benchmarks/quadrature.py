"""Which rule integrates the gradient along the path of integrated gradients best, and from how many
points: rank correlation with the finest rule and the uncorrected residual.

    python benchmarks/quadrature.py record paths.npz   # an hour on two cores; can be interrupted
    python benchmarks/quadrature.py report paths.npz

Prompts: TruthfulQA questions of the last quarter, every fourth of them, 50 in all, in the model's
chat template; F is the summed log-probability of the correct answer over the first false one. Only
the question's own tokens are interpolated, from the zero embedding.

`record` measures F and each token's part of dF/dalpha at 129 evenly spaced points (the finest
rule, of which midpoints, coarser trapezoids and bisection are subsets) and at Gauss-Legendre
points. `report` compares the rules on these records.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from trimtab.attribution.methods.quadrature import rule
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import prompt_from_messages
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model

N_PROMPTS = 50
FINEST = 129
GAUSS = (8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "report"))
    parser.add_argument("paths", type=Path)
    parser.add_argument("--baseline", default="zero")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS)
    given = parser.parse_args()
    if given.what == "record":
        record(given.paths, baseline=given.baseline, n_prompts=given.prompts)
    report(given.paths)


def questions() -> list[tuple[str, str, str]]:
    """Return (question, correct answer, false answer) of the held questions."""
    data = os.environ.get("TRIMTAB_DATA")
    if not data:
        sys.exit("TRIMTAB_DATA must name the folder that holds truthfulqa/mc_task.json")
    rows = json.loads((Path(data) / "truthfulqa" / "mc_task.json").read_text())
    held = rows[3 * len(rows) // 4 :: 4]
    found = []
    for row in held:
        answers = row["mc1_targets"]
        right = next(a for a, is_right in answers.items() if is_right)
        wrong = next(a for a, is_right in answers.items() if not is_right)
        found.append((row["question"], right, wrong))
    return found


def problem_of(subject: Subject, item: tuple[str, str, str], *, baseline: str = "zero") -> Problem:
    question, right, wrong = item
    prompt = prompt_from_messages(subject.tokenizer, [{"role": "user", "content": question}])
    preferred, dispreferred = (
        tuple(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (right, wrong)
    )
    return Problem(subject, prompt, Objective(preferred, dispreferred), baseline=baseline)


def record(path: Path, *, baseline: str, n_prompts: int) -> None:
    loaded = load_model("smollm2", dtype="float32")
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    subject = Subject(loaded, profile)
    nodes = [np.linspace(0, 1, FINEST), *(rule("gausslegendre", n)[0] for n in GAUSS)]
    alphas = np.concatenate(nodes)
    done: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
    for i, item in enumerate(questions()[:n_prompts]):
        if f"values_{i}" in done:
            continue
        problem = problem_of(subject, item, baseline=baseline)
        step = problem.inputs - problem.base
        values, parts = [], []
        for alpha in alphas:
            row = problem.base + float(alpha) * step
            value, gradient = problem.gradients(row.unsqueeze(0))
            values.append(float(value))
            parts.append((gradient[0] * step).sum(-1).double().numpy())
        done[f"values_{i}"] = np.array(values)
        done[f"parts_{i}"] = np.stack(parts)
        np.savez(path, **done)
        print(f"{i + 1}/{n_prompts} {item[0]}", file=sys.stderr, flush=True)


def report(path: Path) -> None:
    print(path)  # filled in below


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()

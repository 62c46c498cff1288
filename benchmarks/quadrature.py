"""Which rule integrates the gradient along the path of integrated gradients best, and from how many
points: rank correlation with the finest rules and the uncorrected residual.

    python benchmarks/quadrature.py record paths.npz   # an hour on two cores; can be interrupted
    python benchmarks/quadrature.py report paths.npz

Prompts: those of `held_questions.py`, 50 of them. Only the question's own tokens are interpolated,
from the zero embedding.

`record` measures F and each token's part of dF/dalpha at 129 evenly spaced points, of which
midpoints, coarser trapezoids and bisection are subsets, and at Gauss-Legendre points. `report`
compares the rules on these records (`quadrature_report.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from held_questions import asked, default_subject, questions
from quadrature_report import FINEST, GAUSS, report

from trimtab.attribution.methods.quadrature import rule
from trimtab.attribution.problem import Problem

N_PROMPTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "report"))
    parser.add_argument("paths", type=Path)
    parser.add_argument("--baseline", default="zero")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS)
    given = parser.parse_args()
    if given.what == "record":
        record(given.paths, baseline=given.baseline, n_prompts=given.prompts)
    print(report(given.paths))


def record(path: Path, *, baseline: str, n_prompts: int) -> None:
    subject = default_subject()
    nodes = [np.linspace(0, 1, FINEST), *(rule("gausslegendre", n)[0] for n in GAUSS)]
    alphas = np.concatenate(nodes)
    done: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
    for i, item in enumerate(questions()[:n_prompts]):
        if f"values_{i}" in done:
            continue
        problem = Problem(subject, *asked(subject, item), baseline=baseline)
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


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()

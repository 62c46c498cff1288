"""Which method's scores point at the tokens the answer hangs on.

    export TRIMTAB_DATA=...                # the folder that holds truthfulqa/mc_task.json
    python benchmarks/attribution_faithfulness.py run zero.json --baseline zero
    python benchmarks/attribution_faithfulness.py report zero.json pad.json

`run` measures every method on every question of `held_questions.py` and saves after each, so that
it can be interrupted and methods added. Everything is measured by `attribution.faithfulness`,
beside the same scores in random places; F is in nats. A question of 12 tokens takes about 1,000
rows, a gradient counted as two more; half of them are `reagent`'s and `shapley_sampling`'s
(15 s and 25 s of one core, without and with these, in bfloat16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics as stats
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from held_questions import asked, continuations, default_subject, questions

from trimtab.attribution.faithfulness import compare
from trimtab.attribution.methods.registry import make
from trimtab.attribution.problem import Problem

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "attnlrp": ("attnlrp", {}),
    "gradient_x_input": ("gradient_x_input", {}),
    "integrated_gradients, 33 points": ("integrated_gradients", {"points": 33}),
    "kernel_shap, 64 masks": ("kernel_shap", {"samples": 64}),
    "kernel_shap, 128 masks": ("kernel_shap", {"samples": 128}),
    "feature_ablation": ("feature_ablation", {}),
    "shapley_sampling, 10 orders": ("shapley_sampling", {"orders": 10}),
    "reagent, 32 steps": ("reagent", {"steps": 32}),
}
SETTINGS: dict[str, Any] = {"n_controls": 4, "n_masks": 32, "n_draws": 2, "seed": 20}


class Remembering(Problem):
    """A problem that reads no mask twice: methods and metrics share many."""

    def logprobs_kept(self, keep: torch.Tensor) -> torch.Tensor:
        """Return what is known of each mask, and read the others."""
        if not hasattr(self, "_known"):
            self._known: dict[bytes, torch.Tensor] = {}
        keys = [bytes(row) for row in keep.to(torch.uint8).tolist()]
        new = {k: i for i, k in reversed(list(enumerate(keys))) if k not in self._known}
        if new:
            read = super().logprobs_kept(keep[list(new.values())])
            self._known.update(zip(new, read, strict=True))
        return torch.stack([self._known[key] for key in keys])


def run(
    path: Path,
    *,
    texts: str,
    baseline: str,
    dtype: str,
    n: int,
    methods: list[str],
    given: dict[str, Any],
) -> None:
    """Measure what is not in the file yet; `given` are scores (question -> method -> `[n]`)."""
    saved: dict[str, Any] = {"baseline": baseline, "dtype": dtype, **SETTINGS, "prompts": {}}
    if path.exists():
        saved = json.loads(path.read_text())
    if (saved["baseline"], saved["dtype"]) != (baseline, dtype):
        sys.exit(f"{path} was measured with {saved['baseline']} and {saved['dtype']}")
    subject = default_subject(dtype=dtype, slice_tokens=256)
    is_chat = saved.setdefault("set", texts) == "questions"
    for i, item in enumerate((questions() if is_chat else continuations())[:n]):
        done = saved["prompts"].setdefault(str(i), {"question": item[0], "methods": {}})
        wanted = [m for m in METHODS if METHODS[m][0] in methods]
        missing = [m for m in wanted if m not in done["methods"]]
        if not missing:
            continue
        problem = Remembering(subject, *asked(subject, item, is_chat=is_chat), baseline=baseline)
        done["n"] = problem.n
        scores, costs = {}, {}
        for name in missing:
            how = make(*METHODS[name])
            costs[name] = how.cost(problem.n)
            if name in given.get(str(i), {}):
                scores[name] = torch.tensor(given[str(i)][name])
            else:
                scores[name] = how.explain(problem).values
        if "random" not in done["methods"]:
            generator = torch.Generator().manual_seed(i)
            scores["random"], costs["random"] = torch.randn(problem.n, generator=generator), 0
        found = compare(problem, scores, **SETTINGS)
        for name, result in found.items():
            done["methods"][name] = {
                "cost": costs[name],
                "scores": scores[name].tolist(),
                **result.to_dict(),
            }
        path.write_text(json.dumps(saved))
        print(f"{i + 1}/{n} {item[0]}", file=sys.stderr, flush=True)


def report(path: Path) -> str:
    """Return the tables of one file."""
    saved = json.loads(path.read_text())
    prompts = [p for p in saved["prompts"].values() if p["methods"]]
    lengths = [p["n"] for p in prompts]
    lines = [
        f"### {saved.get('set', 'questions')}, removal by `{saved['baseline']}`, {saved['dtype']}",
        "",
        f"{len(prompts)} questions, {min(lengths)} to {max(lengths)} content tokens (median "
        f"{stats.median(lengths):g}). dAF and AOPC in nats, mean ± standard error; null SDs: mean "
        "dAF over the root mean square of the permutations' standard deviation on each "
        "question. Values in brackets are those of permuted scores. Cost: rows read by the method, "
        "a gradient as two more, mean.",
        "",
        "| method | questions | cost | dAF | dAF > 0 | null SDs | AOPC 50 % | comprehensiveness "
        "20 % | sufficiency 20 % | soft compr. | soft suff. | infidelity |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = [m for m in (*METHODS, "random") if any(m in p["methods"] for p in prompts)]
    for name in names:
        rows = [p["methods"][name] for p in prompts if name in p["methods"]]
        daf = [r["delta_af"]["value"] for r in rows]
        null = stats.mean(r["delta_af"]["control_sd"] ** 2 for r in rows) ** 0.5
        cells = [
            f"`{name}`",
            str(len(rows)),
            f"{stats.mean(r['cost'] for r in rows):.0f}",
            _mean(daf),
            f"{stats.mean(d > 0 for d in daf):.0%}",
            f"{stats.mean(daf) / null:.2f}",
            *(
                _beside(rows, metric)
                for metric in (
                    "aopc",
                    "comprehensiveness",
                    "sufficiency",
                    "soft_comprehensiveness",
                    "soft_sufficiency",
                    "infidelity",
                )
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Paired, on the questions both were measured on (dAF, nats):", ""]
    pairs = [(m, "random") for m in names if m != "random"]
    pairs += [(m, "attnlrp") for m in names if m not in ("random", "attnlrp")]
    for one, other in pairs:
        both = [p["methods"] for p in prompts if one in p["methods"] and other in p["methods"]]
        if not both:
            continue
        a, b = ([m[x]["delta_af"]["value"] for m in both] for x in (one, other))
        apart = [x - y for x, y in zip(a, b, strict=True)]
        # Random scores come to about nothing, so nothing is a multiple of them.
        ratio = "" if other == "random" else f"; {stats.mean(a) / stats.mean(b):.2f} times its mean"
        lines.append(
            f"- `{one}` minus `{other}`: {_mean(apart)}, higher on "
            f"{stats.mean(d > 0 for d in apart):.0%} of {len(both)}{ratio}"
        )
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    error = stats.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{stats.mean(values):.2f} ± {error:.2f}"


def _beside(rows: list[dict[str, Any]], metric: str) -> str:
    known = [r[metric] for r in rows if r[metric] is not None]
    if not known:
        return "none"
    average: Callable[[str], float] = lambda key: stats.mean(k[key] for k in known)  # noqa: E731
    return f"{average('value'):.2f} ({average('control'):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--set", choices=("questions", "continuations"), default="questions")
    parser.add_argument("--baseline", default="zero")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=52)
    parser.add_argument("--methods", nargs="+", default=[name for name, _ in METHODS.values()])
    parser.add_argument("--scores", type=Path, help="JSON: question's number -> method -> scores")
    given = parser.parse_args()
    if given.what == "run":
        (path,) = given.paths
        run(
            path,
            texts=given.set,
            baseline=given.baseline,
            dtype=given.dtype,
            n=given.prompts,
            methods=given.methods,
            given=json.loads(given.scores.read_text()) if given.scores else {},
        )
    for path in given.paths:
        print(report(path))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()

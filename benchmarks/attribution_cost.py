"""What attribution costs: time beside captum, and memory by length of prompt.

    python benchmarks/attribution_cost.py speed              # with nothing else running
    python benchmarks/attribution_cost.py memory             # a fresh process for each size

`speed` alternates its arms in one process and reports medians of the processor's time, which other
processes on the machine disturb less than the clock's. captum's LLMGradientAttribution
integrates once for each token of the answer; ours once for their sum. Tree: two answers after one
pass over the prompt; apart: the model's own forward pass on each and one gradient.

`memory` reads the kernel's high-water mark of resident memory over one AttnLRP or one exact
gradient, on the default model and on random models of other shapes, and fits what
`attribution/memory.py` estimates by: so many floats a token and layer, pair of tokens and head,
and logit kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_questions import default_subject
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.attribution.memory import gradient_bytes
from trimtab.attribution.methods.registry import make
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import prompt_from_text
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model

TEXT = (
    "The old harbour town lies where the river meets the sea, and every spring the boats are "
    "painted again before the first of them sails out to the islands in the north. The school "
    "closes early on that day, and the bakers sell small loaves in the shape of a fish. Nobody "
    "remembers who began it. "
)
# (layers, width, inner width, heads, key and value heads); None is the default model.
SHAPES = (
    None,
    (6, 512, 512, 8, 8),
    (6, 512, 2048, 8, 8),
    (6, 1024, 1024, 8, 8),
    (6, 512, 512, 8, 2),
)


def question(subject: Subject, n_prompt: int, n_answer: int, *, n_answers: int = 1) -> Problem:
    """Return a question of a given size."""
    tokenizer = subject.tokenizer
    ids = tokenizer(TEXT * (n_prompt // 32 + 1), add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids[:n_prompt])
    answers = [tuple(ids[i * 50 : i * 50 + n_answer]) for i in range(n_answers)]
    return Problem(subject, prompt_from_text(tokenizer, text), Objective(*answers))


# --- speed


def speed(*, points: int, repeats: int) -> None:
    """Print how long each arm takes beside its like."""
    subject = default_subject()
    print(f"{torch.get_num_threads()} thread(s), float32, medians of {repeats}:\n")
    print("| what | CPU s | against | CPU s | ratio of medians | least to most of the turns |")
    print("|---|---|---|---|---|---|")
    for n_prompt in (64,):
        ours, theirs = _integrals(subject, n_prompt, points)
        size = f"prompt {n_prompt}, answer 7"
        _race(f"captum, {points} points, {size}", theirs, "ours", ours, repeats)
    for n_prompt in (64, 256):
        size = f"prompt {n_prompt}, two answers of 7"
        problem = question(subject, n_prompt, 7, n_answers=2)
        rows = problem.inputs.unsqueeze(0)
        lrp, apart = make("attnlrp"), _apart(problem)

        def exact(problem: Problem = problem, rows: torch.Tensor = rows) -> Any:
            return problem.gradients(rows)

        def relevance(problem: Problem = problem, lrp: Any = lrp) -> Any:
            return lrp.explain(problem)

        _race(f"AttnLRP, {size}", relevance, "exact gradient", exact, repeats)
        _race(f"apart, {size}", apart, "tree", exact, repeats)


def _integrals(
    subject: Subject, n_prompt: int, points: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    problem = question(subject, n_prompt, 7)
    assert problem.n == n_prompt
    method = make("integrated_gradients", {"points": points, "rule": "gausslegendre"})
    table = subject.model.get_input_embeddings()
    captum = LLMGradientAttribution(
        LayerIntegratedGradients(subject.model, table), subject.tokenizer
    )
    read = TextTokenInput(problem.prompt.text, subject.tokenizer)
    target = torch.tensor(problem.objective.preferred)

    def theirs() -> Any:
        return captum.attribute(read, target, n_steps=points, method="gausslegendre")

    return lambda: method.explain(problem), theirs


def _apart(problem: Problem) -> Callable[[], Any]:
    model = problem.subject.model
    prompt = problem.subject.embeddings(problem.prompt.ids).unsqueeze(0)
    signs = (1.0, -1.0)

    def run() -> Any:
        leaf = prompt.clone().requires_grad_()
        total = torch.zeros(())
        for sign, ids in zip(signs, problem.objective.answers, strict=False):
            row = torch.cat([leaf, problem.subject.embeddings(ids[:-1]).unsqueeze(0)], dim=1)
            keep = torch.arange(prompt.shape[1] - 1, row.shape[1])
            logits = model(inputs_embeds=row, use_cache=False, logits_to_keep=keep).logits[0]
            own = logits.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
            total = total + sign * (own - logits.logsumexp(-1)).sum()
        return torch.autograd.grad(total, leaf)

    return run


def _race(
    name: str, run: Callable[[], Any], other: str, against: Callable[[], Any], repeats: int
) -> None:
    taken: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        pair = []
        for arm in (run, against):
            began = time.process_time()
            arm()
            pair.append(time.process_time() - began)
        if turn:  # the first warms
            taken.append((pair[0], pair[1]))
    first, second = (stats.median(p[i] for p in taken) for i in (0, 1))
    ratios = [a / b for a, b in taken]
    print(
        f"| {name} | {first:.2f} | {other} | {second:.2f} | {first / second:.2f} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} |",
        flush=True,
    )


# --- memory


def memory(path: Path) -> None:
    """Measure what is not in the file yet, and print the measurements and the fit."""
    done: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for case in _cases():
        if any(case == {k: one[k] for k in case} for one in done):
            continue
        command = [sys.executable, __file__, "peak", "--case", json.dumps(case)]
        # Small blocks are given back when freed, so that the mark is of what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        found = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        done.append(json.loads(found.stdout))
        path.write_text(json.dumps(done))
        print(done[-1], file=sys.stderr, flush=True)
    print("| model | dtype | method | prompt | answer | peak, MiB | estimate, MiB |")
    print("|---|---|---|---|---|---|---|")
    for one in done:
        print(
            f"| {one['shape'] or 'default'} | {one['dtype']} | {one['method']} | {one['n_prompt']} "
            f"| {one['n_answer']} | {one['bytes'] / 2**20:.0f} | {one['estimate'] / 2**20:.0f} |"
        )
    print(f"\n{fitted(done)}")


def _cases() -> list[dict[str, Any]]:
    cases = []
    for shape in SHAPES:
        sizes = (
            ((64, 8), (256, 8), (1024, 8), (256, 128)) if shape is None else ((256, 8), (1024, 8))
        )
        for dtype in ("float32", "bfloat16") if shape is None else ("float32",):
            for method in ("attnlrp", "gradient"):
                cases += [
                    {
                        "shape": None if shape is None else list(shape),
                        "dtype": dtype,
                        "method": method,
                        "n_prompt": n_prompt,
                        "n_answer": n_answer,
                    }
                    for n_prompt, n_answer in sizes
                ]
    return cases


def peak(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case with the bytes its gradient took at the peak."""
    loaded = load_model("smollm2", dtype=case["dtype"])
    if case["shape"] is not None:
        n_layers, width, inner, n_heads, n_kv = case["shape"]
        config = LlamaConfig(
            vocab_size=loaded.model.config.vocab_size,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
        loaded = dataclasses.replace(loaded, model=model)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    subject = Subject(loaded, profile)
    is_lrp = case["method"] == "attnlrp"

    def run(n_prompt: int, n_answer: int) -> Problem:
        problem = question(subject, n_prompt, n_answer)
        problem.gradients(problem.inputs.unsqueeze(0), is_lrp=is_lrp)
        return problem

    run(8, 2)  # what is made once
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    problem = run(case["n_prompt"], case["n_answer"])
    config = loaded.model.config
    return {
        **case,
        "bytes": _status("VmHWM") - before,
        "estimate": gradient_bytes(loaded.model, problem.row_tokens, n_logits=len(problem.weights)),
        "row_tokens": problem.row_tokens,
        "n_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv": config.num_key_value_heads,
        "vocab": config.vocab_size,
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def fitted(done: list[dict[str, Any]]) -> str:
    """Return the coefficients that fit the measured bytes best, in relative error."""
    lines = ["| method | dtype | width | inner | pair and head | logit kept | worst error |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method in ("attnlrp", "gradient"):
        for dtype in ("float32", "bfloat16"):
            own = [o for o in done if (o["method"], o["dtype"]) == (method, dtype)]
            columns = [
                [
                    o["row_tokens"] * o["n_layers"] * o["width"],
                    o["row_tokens"] * o["n_layers"] * o["inner"],
                    o["row_tokens"] ** 2 * o["n_layers"] * o["n_heads"],
                    o["n_answer"] * o["vocab"],
                ]
                for o in own
            ]
            if len(own) < 4:
                continue
            table = np.array(columns, dtype=float)
            taken = np.array([o["bytes"] for o in own], dtype=float)
            if dtype == "bfloat16":  # one model: its widths have one ratio
                table[:, 0] += table[:, 1]
                table[:, 1] = 0
            found, *_ = np.linalg.lstsq(table / taken[:, None], np.ones(len(taken)), rcond=None)
            worst = np.abs(table @ found / taken - 1).max()
            cells = [f"{x:.1f}" for x in found]
            lines.append(f"| {method} | {dtype} | {' | '.join(cells)} | {worst:.0%} |")
    lines.append(
        "\nBytes for each token, layer and unit of width or inner width; for each pair of tokens, "
        "layer and head; for each token of the vocabulary and position kept. In bfloat16 width and "
        "inner width share one coefficient."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory", "peak"))
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--file", type=Path, default=Path("memory.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "speed":
        speed(points=given.points, repeats=given.repeats)
    elif given.what == "memory":
        memory(given.file)
    else:
        print(json.dumps(peak(given.case)))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()

"""From a question to scores: the one way in for servers, builders and scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from trimtab.attribution.errors import NonFiniteError
from trimtab.attribution.faithfulness import faithfulness
from trimtab.attribution.lrp import lrp_problem
from trimtab.attribution.methods.registry import DEFAULT, WITHOUT_GRADIENTS, Method, make, name_of
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import Prompt
from trimtab.attribution.result import Attribution, OutputToken
from trimtab.attribution.slices import Slices, directly
from trimtab.attribution.subject import Subject
from trimtab.steering.plan import Plan

# What one result's faithfulness may cost: at most 20 * 5 + 2 * 2 * 5 + 32 + 2 rows.
_MEASURING: dict[str, int] = {"n_controls": 4, "n_masks": 32, "n_draws": 2}
_MEASURED_ROWS = 154


def default_method(subject: Subject, *, attnlrp: bool = True) -> str:
    """Return the name of the method that suits a model when nobody names one.

    Args:
        subject: the model.
        attnlrp: whether AttnLRP may be used.
    """
    is_ruled = lrp_problem(subject.model) is None and subject.tree_problem is None
    return DEFAULT if attnlrp and is_ruled else WITHOUT_GRADIENTS


def attribute(
    subject: Subject,
    prompt: Prompt,
    objective: Objective,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    baseline: str = "zero",
    is_measured: bool = False,
    plan: Plan | None = None,
    slices: Slices = directly,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Score the tokens of a prompt by what they did for an answer.

    Args:
        subject: the model.
        prompt: what it reads.
        objective: the answer, or the two, in question.
        method: registry name or alias; None takes `default_method`.
        options: the method's options.
        baseline: what stands in for a token taken away: `zero`, `pad`, `mean` or `drop`.
        is_measured: measure the scores' faithfulness too.
        plan: steering of the model under question.
        slices: where each bounded piece of the work runs.
        progress: told (rows done, rows in all) after each piece; a gradient counts as two more.

    Raises:
        AttributionError: the question cannot be asked of this model.
        NotFoundError, DataError: unknown method or option.
        NonFiniteError: the scores are not finite.
    """
    began = time.perf_counter()
    method = method or default_method(subject)
    how = make(method, options)
    total = rows_of(how, len(prompt.content), is_measured=is_measured)

    def tell(done: int) -> None:
        if progress is not None:
            progress(min(done, total), total)

    problem = Problem(
        subject, prompt, objective, baseline=baseline, plan=plan, slices=slices, progress=tell
    )
    keep = torch.ones(2, problem.n, dtype=torch.bool)
    keep[1] = False
    logprobs = problem.logprobs_kept(keep)
    value, base_value = (logprobs.double() @ problem.weights.double()).tolist()
    found = how.explain(problem)
    if not torch.isfinite(found.values).all():
        raise NonFiniteError("The scores are not finite; use another method.")
    measured = None
    if is_measured:
        measured = faithfulness(problem, found.values, **_MEASURING)
    scores: list[float | None] = [None] * len(prompt.tokens)
    for i, score in zip(prompt.content, found.values.tolist(), strict=True):
        scores[i] = score
    return Attribution(
        prompt=prompt,
        objective=objective,
        scores=tuple(scores),
        units=found.units,
        output=_output(subject, objective, logprobs[0].tolist()),
        method=name_of(method),
        settings={**asdict(how), **found.facts},  # type: ignore[call-overload]
        baseline=baseline,
        value=value,
        base_value=base_value,
        residual=found.residual,
        error_bound=found.error_bound,
        model=subject.profile.ref.id,
        dtype=str(subject.dtype).removeprefix("torch."),
        steered=None if problem.plan is None else problem.plan.fingerprint,
        forward_rows=problem.forward_rows,
        backward_rows=problem.backward_rows,
        seconds=time.perf_counter() - began,
        faithfulness=measured,
    )


def rows_of(how: Method, n: int, *, is_measured: bool) -> int:
    """Return the rows an attribution reads at most, a gradient as two more.

    Args:
        how: the method.
        n: content tokens.
        is_measured: whether its faithfulness is measured too.
    """
    return 2 + how.cost(n) + (_MEASURED_ROWS if is_measured else 0)


def _output(
    subject: Subject, objective: Objective, logprobs: list[float]
) -> tuple[OutputToken, ...]:
    names = ("preferred", "dispreferred") if objective.dispreferred is not None else ("target",)
    tokens = [
        (name, id) for name, answer in zip(names, objective.answers, strict=True) for id in answer
    ]
    return tuple(
        OutputToken(name, id, subject.tokenizer.decode([id]), logprob)
        for (name, id), logprob in zip(tokens, logprobs, strict=True)
    )

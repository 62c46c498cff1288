"""Integrated gradients: captum's numbers at captum's settings, and sums that are what they say."""

from __future__ import annotations

import pytest
import torch
from toy_question import CONTRAST, toy_problem, toy_prompt, toy_subject

from trimtab.attribution.attribute import attribute
from trimtab.attribution.methods.quadrature import RULES, rule
from trimtab.attribution.methods.registry import make
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import prompt_from_messages
from trimtab.attribution.subject import Subject
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import profile_model


@pytest.fixture(scope="module")
def llama() -> Subject:
    return toy_subject()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", [2, 5, 16])
def test_a_rule_integrates_what_it_can(name: str, n: int) -> None:
    """captum's trapezoid has weights that sum to (n - 1) / n, and so do its scores."""
    nodes, weights = rule(name, n)
    assert len(nodes) == len(weights) == n
    assert weights.sum() == pytest.approx(1)
    assert (weights * nodes).sum() == pytest.approx(1 / 2)  # exact for a straight line
    degree = 2 * n - 1 if name == "gausslegendre" else 1
    assert (weights * nodes**degree).sum() == pytest.approx(1 / (degree + 1))
    assert nodes.min() >= 0
    assert nodes.max() <= 1


@pytest.mark.parametrize("name", ["bisection", *RULES])
def test_the_sum_is_exact_only_where_it_is_corrected(llama: Subject, name: str) -> None:
    """A residual taken after the correction is always zero and hides an integral gone wrong."""
    prompt = toy_prompt(llama, "a cat", "yes", "why?")
    options = {"rule": name, "points": 5}
    corrected, plain = (
        attribute(
            llama, prompt, CONTRAST, method="ig", options={**options, "correct": is_corrected}
        )
        for is_corrected in (True, False)
    )
    assert corrected.completeness_gap == pytest.approx(0, abs=1e-4)
    assert plain.completeness_gap == pytest.approx(plain.residual, abs=1e-5)
    assert corrected.residual == pytest.approx(plain.residual, abs=1e-6)
    assert abs(plain.residual or 0) > 1e-3  # five points are too few
    assert plain.error_bound is not None
    assert plain.error_bound >= abs(plain.residual or 0) - 1e-6
    assert corrected.value - corrected.base_value == pytest.approx(corrected.total, abs=1e-4)


@pytest.fixture(scope="module")
def converged(llama: Subject) -> torch.Tensor:
    problem = toy_problem(llama, baseline="mean")  # at zero the norms make the path too steep
    options = {"rule": "gausslegendre", "points": 128, "correct": False}
    found = make("ig", options).explain(problem)
    assert abs(found.residual or 0) < 1e-3
    return found.values


@pytest.mark.parametrize("name", ["bisection", *RULES])
def test_more_points_come_nearer(llama: Subject, converged: torch.Tensor, name: str) -> None:
    """Nodes in the wrong order, or weights of other nodes, do not converge."""
    problem = toy_problem(llama, baseline="mean")
    errors = []
    for points in (4, 40):
        options = {"rule": name, "points": points, "correct": False}
        found = make("ig", options).explain(problem).values
        errors.append(float((found - converged).norm() / converged.norm()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.02


def test_bisection_measures_where_f_is_rough(llama: Subject) -> None:
    """Halving the widest interval instead of the worst spends its points where F is flat."""
    problem = toy_problem(llama)
    spent = []

    def gradients(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # F rises steeply in the first twentieth of the path and is flat afterwards.
        step = problem.inputs - problem.base
        at = ((rows - problem.base) * step).sum((1, 2)) / step.square().sum()
        spent.extend(at.tolist())
        slope = torch.where(at < 0.05, torch.cos(at * 20), 0.0)
        return torch.where(at < 0.05, torch.sin(at * 20) / 20, 0.0421), slope[:, None, None] * step

    problem.gradients = gradients  # type: ignore[method-assign,assignment]
    make("ig", {"points": 17}).explain(problem)
    assert len(spent) == 17
    assert sum(at <= 0.125 for at in spent) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "captums"), [("gausslegendre", "gausslegendre"), ("midpoint", "riemann_middle")]
)
def test_fixed_rules_are_captums(smollm2: LoadedModel, ours: str, captums: str) -> None:
    """A path of our own over a tree of our own must still be the published method's."""
    from captum.attr import IntegratedGradients

    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    subject = Subject(smollm2, profile)
    messages = [{"role": "user", "content": "Is the sky blue?"}]
    prompt = prompt_from_messages(smollm2.tokenizer, messages)
    # In float32 a gradient near the zero embedding is off by 2e-4, captum's as ours; and with fewer
    # than four rows of logits the CPU sums 49152 products one after the other, which is as bad.
    answers = [tuple(smollm2.tokenizer(text)["input_ids"]) for text in ("Yes, it is", "No, not")]
    problem = Problem(subject, prompt, Objective(*answers), baseline="mean")
    table = smollm2.model.get_input_embeddings()
    content = torch.tensor(prompt.content)

    def plain(rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(rows))
        for sign, answer in zip((1, -1), answers, strict=True):
            ids = torch.tensor([*prompt.ids, *answer])
            tokens = table(ids).expand(len(rows), -1, -1).index_copy(1, content, rows)
            logits = smollm2.model(inputs_embeds=tokens, use_cache=False).logits
            logprobs = logits[:, len(prompt.ids) - 1 : -1].log_softmax(-1)
            for k, id in enumerate(answer):
                total = total + sign * logprobs[:, k, id]
        return total

    wanted = IntegratedGradients(plain).attribute(
        problem.inputs.unsqueeze(0),
        baselines=problem.base.unsqueeze(0),
        n_steps=4,
        method=captums,
        internal_batch_size=1,
    )
    options = {"rule": ours, "points": 4, "correct": False}
    found = make("ig", options).explain(problem).values
    apart = found - wanted[0].sum(-1).float()
    assert float(apart.norm() / found.norm()) < 1e-4

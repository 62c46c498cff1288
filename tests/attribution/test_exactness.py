"""Where the right scores are known: F that is linear, F of pairs, games small enough to solve."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from toy_question import toy_problem, toy_subject

from trimtab.attribution.methods.mask_fit import kernel_masks
from trimtab.attribution.methods.registry import make
from trimtab.attribution.problem import Problem
from trimtab.attribution.subject import Subject

EXACT_IF_LINEAR = [
    ("feature_ablation", {}),
    ("gradient_x_input", {}),
    ("integrated_gradients", {}),
    ("integrated_gradients", {"correct": False}),
    ("integrated_gradients", {"rule": "midpoint", "points": 2, "correct": False}),
    ("integrated_gradients", {"rule": "gausslegendre", "points": 3, "correct": False}),
    ("integrated_gradients", {"rule": "trapezoid", "points": 3, "correct": False}),
    ("kernel_shap", {}),
    ("kernel_shap", {"weighting": "shapley"}),
    ("shapley_sampling", {"orders": 1}),
]
EXACT_IF_PAIRS = [
    ("kernel_shap", {}),
    ("kernel_shap", {"weighting": "shapley"}),
    ("shapley_sampling", {"orders": 2}),
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return toy_subject()


def game(subject: Subject, contents: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Problem:
    """A question whose F is a function of which tokens are there, `[batch, n]` to `[batch]`."""
    problem = toy_problem(subject, contents=(contents,))
    problem.values_kept = lambda keep: value(keep.float())  # type: ignore[method-assign]
    return problem


@pytest.mark.parametrize(("method", "options"), EXACT_IF_LINEAR)
def test_a_linear_f_is_explained_exactly(
    subject: Subject, method: str, options: dict[str, object]
) -> None:
    """A step lost along the path, or a penalty too large, makes every score a little small."""
    problem = toy_problem(subject, baseline="mean")
    slopes = torch.randn(problem.inputs.shape, generator=torch.Generator().manual_seed(0))

    def values(rows: torch.Tensor) -> torch.Tensor:
        return 3.0 + (rows * slopes).sum((1, 2))

    def gradients(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values(rows), slopes.expand_as(rows)

    def kept(keep: torch.Tensor) -> torch.Tensor:
        return values(torch.where(keep.unsqueeze(-1), problem.inputs, problem.base))

    problem.values, problem.gradients = values, gradients  # type: ignore[method-assign]
    problem.values_kept = kept  # type: ignore[method-assign]
    wanted = ((problem.inputs - problem.base) * slopes).sum(1)
    found = make(method, options).explain(problem)
    assert torch.allclose(found.values, wanted, rtol=1e-4, atol=1e-5)
    if found.residual is not None:
        assert abs(found.residual) < 1e-4


@pytest.mark.parametrize(("method", "options"), EXACT_IF_PAIRS)
def test_what_pairs_do_is_halved(subject: Subject, method: str, options: dict[str, object]) -> None:
    """Masks without their complement, or orders without their reverse, leave noise of pairs."""
    n = 14
    g = torch.Generator().manual_seed(0)
    alone = torch.randn(n, generator=g)
    pairs = torch.randn(n, n, generator=g).triu(1)
    problem = game(subject, "a" * n, lambda z: z @ alone + ((z @ pairs) * z).sum(1))
    found = make(method, options).explain(problem)
    wanted = alone + (pairs + pairs.T).sum(1) / 2
    assert torch.allclose(found.values, wanted, atol=1e-3)


def solved(table: dict[tuple[bool, ...], float], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Shapley and Banzhaf values of a game by their definitions."""
    shapley = torch.zeros(n, dtype=torch.float64)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        there = [False] * n
        for i in order:
            before = table[tuple(there)]
            there[i] = True
            shapley[i] += (table[tuple(there)] - before) / len(orders)
    banzhaf = torch.zeros(n, dtype=torch.float64)
    for there in table:
        for i in range(n):
            sign = 1 if there[i] else -1
            banzhaf[i] += sign * table[there] / 2 ** (n - 1)
    return shapley, banzhaf


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_small_games_are_solved(subject: Subject, n: int) -> None:
    """Weights of the kernel off by one size, or the full mask counted, miss by a few per cent."""
    g = torch.Generator().manual_seed(n)
    masks = list(itertools.product((False, True), repeat=n))
    table = {mask: float(torch.randn((), generator=g) * 5) for mask in masks}
    problem = game(
        subject,
        "a" * n,
        lambda z: torch.tensor([table[tuple(row)] for row in z.bool().tolist()]),
    )
    shapley, banzhaf = solved(table, n)
    total = table[masks[-1]] - table[masks[0]]
    found = make("kernel_shap", {"weighting": "shapley"}).explain(problem)
    assert torch.allclose(found.values.double(), shapley, atol=1e-4)
    assert float(found.values.sum()) == pytest.approx(total, abs=1e-4)
    found = make("kernel_shap").explain(problem)
    assert torch.allclose(found.values.double(), banzhaf, atol=1e-4)
    assert found.residual == pytest.approx(total - float(banzhaf.sum()), abs=1e-4)
    found = make("shapley_sampling", {"orders": 1000}).explain(problem)
    assert torch.allclose(found.values.double(), shapley, atol=0.5)
    assert float(found.values.sum()) == pytest.approx(total, abs=1e-4)
    found = make("feature_ablation").explain(problem)
    lost = [total_without(table, i, n) for i in range(n)]
    assert found.values.tolist() == pytest.approx(lost, abs=1e-4)


def total_without(table: dict[tuple[bool, ...], float], i: int, n: int) -> float:
    return table[(True,) * n] - table[tuple(j != i for j in range(n))]


def test_as_many_masks_as_tokens_do_no_harm(subject: Subject) -> None:
    """Without a penalty forty equations for forty scores blow up what the masks leave unsaid."""
    g = torch.Generator().manual_seed(0)
    slopes, noise = torch.randn(2, 40, generator=g)
    problem = game(subject, "a" * 40, lambda z: z @ slopes + torch.sin(z @ noise * 3))
    found = make("kernel_shap", {"samples": 80}).explain(problem)
    assert float((found.values - slopes).norm()) < 0.5 * float(slopes.norm())
    assert 0.3 < found.facts["explained"] < 1


def test_masks_are_drawn_by_the_kernel() -> None:
    """Sizes off by one count the empty mask, whose weight is infinite, as any other."""
    n, n_masks = 6, 20_000
    masks = kernel_masks(n, n_masks, torch.Generator().manual_seed(0))
    sizes = masks.sum(1).bincount(minlength=n + 1) / n_masks
    kernel = torch.tensor([0.0, *(1 / (s * (n - s)) for s in range(1, n)), 0.0])
    assert torch.allclose(sizes, kernel / kernel.sum(), atol=0.015)
    assert torch.allclose(masks.float().mean(0), torch.full((n,), 0.5), atol=0.015)


def test_reagent_finds_the_token_that_matters(subject: Subject) -> None:
    """Updates with the wrong sign give the most to the words that do nothing."""
    problem = game(subject, "a" * 12, lambda z: 6 * z[:, 7] - 3)
    found = make("reagent", {"replacer": "baseline", "tolerance": 0.0}).explain(problem)
    assert int(found.values.argmax()) == 7
    assert float(found.values[7]) > 3 / 12

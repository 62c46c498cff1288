"""What stands in for a token is another token, where it was asked for and nowhere else."""

from __future__ import annotations

import pytest
import torch
from toy_question import toy_problem, toy_subject

from trimtab.attribution.methods.replacement import Replacement
from trimtab.attribution.problem import Problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return toy_problem(toy_subject())


def replacement(problem: Problem, replacer: str) -> Replacement:
    return Replacement(problem, replacer, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("replacer", ["model", "uniform", "baseline"])
def test_only_what_is_taken_away_is_replaced(problem: Problem, replacer: str) -> None:
    """The tokens that stay replaced in place of the others gives every step the wrong sign."""
    away = torch.zeros(2, problem.n, dtype=torch.bool)
    away[1] = True
    values = replacement(problem, replacer).values(away)
    own = problem.values(problem.inputs.unsqueeze(0))
    assert float(values[0]) == pytest.approx(float(own), abs=1e-5)
    assert abs(float(values[1] - values[0])) > 1e-3


@pytest.mark.parametrize("replacer", ["model", "uniform"])
def test_stand_ins_are_words_and_never_the_token_itself(problem: Problem, replacer: str) -> None:
    """An end mark in the middle of a sentence is no replacement, and the same token is none."""
    drawn = replacement(problem, replacer)._drawn
    assert drawn is not None
    tokenizer = problem.subject.tokenizer
    own = torch.tensor([problem.prompt.ids[i] for i in problem.prompt.content])
    assert drawn.shape[1] == problem.n
    assert not (drawn == own).any()
    assert not torch.isin(drawn, torch.tensor(tokenizer.all_special_ids)).any()
    assert int(drawn.max()) < len(tokenizer)
    assert len(drawn[:, 0].unique()) > 5


def test_the_models_stand_ins_are_the_likely_ones(problem: Problem) -> None:
    """Draws by the prediction for another place, or by none, are no better than uniform ones."""
    chances = problem.predictions(range(problem.n)).exp()
    drawn = {r: replacement(problem, r)._drawn for r in ("model", "uniform")}
    mean = {}
    for replacer, ids in drawn.items():
        assert ids is not None
        mean[replacer] = float(chances.gather(1, ids.T).mean())
    assert mean["model"] > 1.5 * mean["uniform"]

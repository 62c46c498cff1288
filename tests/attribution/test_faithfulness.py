"""Laws of the faithfulness metrics, on questions whose answer is known in closed form."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from toy_question import toy_problem, toy_subject

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.faithfulness import Faithfulness, compare, faithfulness
from trimtab.attribution.methods.registry import make
from trimtab.attribution.problem import Problem
from trimtab.attribution.soft_removal import hellinger, keep_rates

WORTH = torch.tensor([3.0, -1.0, 0.5, 2.0, -2.5, 1.0, 0.0, 4.0, -0.5, 1.5])


class Linear(Problem):
    """F is the sum of what the tokens there are worth; log P of the answer is F - 20."""

    def __init__(self, worth: torch.Tensor = WORTH, *, baseline: str = "zero") -> None:
        self.n = len(worth)
        self.inputs = torch.ones(self.n, 16)
        self.base = torch.zeros(self.n, 16)
        self.baseline = baseline
        self.forward_rows = 0
        self.worth = worth

    def values_kept(self, keep: torch.Tensor) -> torch.Tensor:
        self.forward_rows += len(keep)
        return (keep.double() @ self.worth.double()).float()

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        self.forward_rows += len(rows)
        return (rows.mean(-1) @ self.worth - 20).unsqueeze(1)


def spread(found: Faithfulness) -> dict[str, object]:
    """Everything that was measured; not what it cost."""
    return {name: value for name, value in asdict(found).items() if name != "rows"}


def test_perfect_scores_have_the_areas_of_a_sorted_sum() -> None:
    """A curve with a point too few, in the wrong order or of the wrong width has another area."""
    found = faithfulness(Linear(), WORTH)
    ranked = WORTH.sort(descending=True).values
    deletion = [float(ranked[k:].sum()) for k in range(11)]
    insertion = [float(ranked[:k].sum()) for k in range(11)]
    assert found.deletion == pytest.approx(deletion, abs=1e-5)
    assert found.insertion == pytest.approx(insertion, abs=1e-5)
    area = sum(insertion) - sum(deletion)  # the halves at the ends are the same
    assert found.delta_af.value == pytest.approx(area / 10, abs=1e-5)
    assert found.aopc.value == pytest.approx(deletion[0] - sum(deletion[1:6]) / 5, abs=1e-5)
    assert found.comprehensiveness.value == pytest.approx(7.0, abs=1e-5)  # 4 and 3
    assert found.sufficiency.value == pytest.approx(float(WORTH.sum()) - 7.0, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 13, 33])
def test_area_of_equal_tokens_is_half_of_all(n: int) -> None:
    """Shares that do not fall on whole tokens must not count as if they did."""
    found = faithfulness(Linear(torch.ones(n)), torch.arange(n).float())
    height = torch.tensor(found.deletion, dtype=torch.float64)
    at = 1 - height / n
    assert float(torch.trapezoid(height, at)) == pytest.approx(n / 2)
    assert found.delta_af.value == pytest.approx(0, abs=1e-5)


def test_constant_scores_show_nothing() -> None:
    """Ties broken in one direction reward whoever scores all tokens alike, or punish it."""
    found = faithfulness(Linear(), torch.ones(10))
    assert found.delta_af.value == 0
    assert found.delta_af.control == pytest.approx(0, abs=1e-9)
    assert found.soft_sufficiency is not None
    assert found.soft_sufficiency.value == pytest.approx(found.soft_sufficiency.control)
    assert found.soft_sufficiency.control_sd == 0


def test_permuted_scores_come_to_nothing_on_average() -> None:
    """A control that keeps some of the scores' order, which would hide a method's merit."""
    found = faithfulness(Linear(), WORTH, n_controls=400)
    assert abs(found.delta_af.control) < 4 * found.delta_af.control_sd / 400**0.5
    assert found.delta_af.value > 3 * found.delta_af.control_sd
    assert found.infidelity is not None
    assert found.infidelity.control > 0.3


def test_flipped_scores_have_the_opposite_area() -> None:
    """Ranking by size instead of by sign, or curves that do not mirror each other."""
    for worth in (WORTH, torch.randn(13, generator=torch.Generator().manual_seed(0))):
        there = faithfulness(Linear(worth), worth)
        back = faithfulness(Linear(worth), -worth)
        assert there.delta_af.value > 0
        assert back.delta_af.value == pytest.approx(-there.delta_af.value)
        assert there.infidelity is not None
        assert back.infidelity is not None
        assert there.infidelity.value < 1e-9
        assert back.infidelity.value == 1


def test_scale_changes_nothing() -> None:
    """A soft metric that rewards the mass of the scores, or an infidelity in their unit."""
    scores = WORTH + torch.randn(10, generator=torch.Generator().manual_seed(0))
    first = spread(faithfulness(Linear(), scores))
    for scale in (1e-3, 1e4):
        again = spread(faithfulness(Linear(), scores * scale))
        infidelity, other = first["infidelity"], again["infidelity"]
        assert infidelity == pytest.approx(other, rel=1e-5)
        assert {**first, "infidelity": None} == {**again, "infidelity": None}


def test_soft_metrics_tell_good_scores_from_bad() -> None:
    """Keep rates the wrong way round, a distance that does not move, or ranks with a sign: to take
    away what speaks against the answer moves it as far."""
    good, flipped, bad = (
        faithfulness(Linear(), s, n_draws=32) for s in (WORTH, -WORTH, 1 / (WORTH.abs() + 1))
    )
    assert good.soft_sufficiency is not None
    assert good.soft_comprehensiveness is not None
    assert bad.soft_sufficiency is not None
    assert bad.soft_comprehensiveness is not None
    assert flipped.soft_sufficiency is not None
    assert flipped.soft_sufficiency.value == good.soft_sufficiency.value
    assert good.soft_sufficiency.value > bad.soft_sufficiency.value
    assert good.soft_comprehensiveness.value > bad.soft_comprehensiveness.value


def test_keep_rates_have_one_mean() -> None:
    """Scores of which a few are large must keep no less of the prompt than even ones."""
    rows = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 9], [5, 5, 5, 5], [-4, 1, 1, 8]]).double()
    rates = keep_rates(rows)
    assert torch.allclose(rates.mean(1), torch.full((4,), 0.5).double())
    assert rates[0].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert rates[2].tolist() == [0.5] * 4
    assert rates.min() > 0
    assert rates.max() < 1


def test_hellinger_is_a_distance() -> None:
    """Rounding below zero under the root, or a distance beyond 1."""
    p = torch.tensor([-80.0, -3.0, -1e-9, 0.0])
    assert hellinger(p, p).tolist() == [0.0] * 4
    assert float(hellinger(torch.tensor(-200.0), torch.tensor(0.0))) == pytest.approx(1)


def test_the_seed_decides() -> None:
    """Draws from torch's global generator, or a seed that is not used."""
    scores = WORTH.roll(1)
    torch.manual_seed(1)
    first = faithfulness(Linear(), scores, seed=3)
    torch.manual_seed(2)
    assert faithfulness(Linear(), scores, seed=3) == first
    other = faithfulness(Linear(), scores, seed=4)
    assert other.delta_af.value == first.delta_af.value
    assert other.delta_af.control_sd != first.delta_af.control_sd
    assert other.infidelity != first.infidelity


def test_comparing_changes_nothing_and_shares_rows() -> None:
    """Methods measured together must not see each other, and must not pay for each other."""
    scores = {"good": WORTH, "shifted": WORTH.roll(1), "bad": -WORTH}
    together = compare(Linear(), scores)
    alone = {name: faithfulness(Linear(), s) for name, s in scores.items()}
    for name, found in together.items():
        assert spread(found) == spread(alone[name])
    assert together["good"].rows < sum(found.rows for found in alone.values()) / 2
    m, c, d, k = 3, 8, 4, 64
    assert together["good"].rows <= 20 * (m + c) + 2 * d * (m + c) + k + 2


def test_nothing_to_measure_is_none() -> None:
    """A ratio with nothing below the line must not come out as a number, let alone NaN."""
    found = faithfulness(Linear(torch.zeros(10)), WORTH)
    assert found.infidelity is None
    assert found.soft_sufficiency is None
    assert found.delta_af.value == 0
    assert faithfulness(Linear(baseline="drop"), WORTH).soft_comprehensiveness is None
    assert "NaN" not in json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        (torch.ones(9), {}),
        (torch.full((10,), float("nan")), {}),
        (WORTH, {"n_controls": 1}),
        (WORTH, {"n_masks": 0}),
        (WORTH, {"n_draws": 0}),
        (WORTH, {"share": 1.5}),
    ],
)
def test_what_cannot_be_measured_is_refused(scores: torch.Tensor, options: dict[str, int]) -> None:
    """Scores of another prompt, or NaN, which sorts to an end and looks like a ranking."""
    with pytest.raises(AttributionError):
        faithfulness(Linear(), scores, **options)


@pytest.mark.parametrize("baseline", ["zero", "drop"])
def test_a_model_can_be_measured(baseline: str) -> None:
    """The stub above and the real thing have to offer the same."""
    problem = toy_problem(toy_subject(), baseline=baseline)
    scores = make("feature_ablation").explain(problem).values
    found = faithfulness(problem, scores, n_controls=2, n_masks=8, n_draws=2)
    ends = problem.values_kept(torch.tensor([[True], [False]]).expand(2, problem.n))
    assert found.deletion[0] == pytest.approx(float(ends[0]), abs=1e-4)
    assert found.insertion[0] == pytest.approx(float(ends[1]), abs=1e-4)
    assert found.deletion[-1] == found.insertion[0]
    assert found.comprehensiveness.value > 0
    assert (found.soft_sufficiency is None) == (baseline == "drop")

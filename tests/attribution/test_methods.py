"""What every attribution method promises, whichever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_question import CONTRAST, toy_problem, toy_prompt, toy_subject
from toys import TOYS

from trimtab.attribution.attribute import attribute
from trimtab.attribution.errors import AttributionError, NonFiniteError
from trimtab.attribution.methods.registry import ALIASES, DEFAULT, METHODS, describe, make
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import TokenKind
from trimtab.attribution.result import Attribution
from trimtab.attribution.subject import Subject
from trimtab.steering.errors import DataError, NotFoundError

QUICK: dict[str, dict[str, Any]] = {"reagent": {"steps": 4}, "shapley_sampling": {"orders": 2}}
ANY_MODEL = sorted(set(METHODS) - {"attnlrp"})
BAD_OPTIONS = {
    "integrated_gradients": [{"points": 2}, {"rule": "simpson"}, {"rule": "midpoint", "points": 1}],
    "kernel_shap": [{"samples": 3}, {"samples": 10**6}, {"weighting": "lime"}],
    "reagent": [{"replacer": "roberta"}, {"steps": 0}, {"replace": 0.0}, {"tolerance": -1.0}],
    "shapley_sampling": [{"orders": 0}, {"orders": 10**6}],
}


@pytest.fixture(scope="module")
def llama() -> Subject:
    return toy_subject()


def asked(subject: Subject, method: str, *contents: str, **options: Any) -> Attribution:
    prompt = toy_prompt(subject, *(contents or ("a cat", "yes", "why?")))
    options.setdefault("options", QUICK.get(method))
    return attribute(subject, prompt, CONTRAST, method=method, **options)


def test_every_method_says_where_it_comes_from() -> None:
    """A method without its source, or one that the menus would show without a summary."""
    cards = describe()
    assert [card.name for card in cards] == sorted(METHODS)
    for card in cards:
        assert "arXiv" in card.source
        assert card.summary.endswith(".")
        assert make(card.name, card.options) == make(card.name)
    assert set(ALIASES.values()) <= set(METHODS)
    assert not set(ALIASES) & set(METHODS)
    assert DEFAULT in METHODS


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_content_tokens_own(llama: Subject, method: str) -> None:
    """A score shifted by one token, or on a word of the template, explains another word."""
    found = asked(llama, method)
    for token, score in zip(found.prompt.tokens, found.scores, strict=True):
        assert (score is not None) == (token.kind is TokenKind.TEXT)
    own = make(method, QUICK.get(method)).explain(toy_problem(llama)).values
    assert own.shape == (12,)
    assert own.dtype == torch.float32
    assert [s for s in found.scores if s is not None] == pytest.approx(own.tolist(), abs=1e-6)
    assert found.max_abs > 0


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_deterministic(llama: Subject, method: str) -> None:
    """Draws from torch's global generator change with the server's other work, and change it."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = asked(llama, method).scores
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert asked(llama, method).scores == first


@pytest.mark.parametrize("method", ["kernel_shap", "reagent", "shapley_sampling"])
def test_the_seed_is_used(llama: Subject, method: str) -> None:
    """A seed that changes nothing means that the draws are the same in every place they occur."""
    quick = QUICK.get(method, {})
    one, other = (asked(llama, method, options={**quick, "seed": s}).scores for s in (0, 1))
    assert one != other


@pytest.mark.parametrize("method", METHODS)
def test_repeated_tokens_are_scored_apart(llama: Subject, method: str) -> None:
    """Scores kept by the token's text or id merge the three."""
    found = asked(llama, method, "go go go")
    repeated = [s for t, s in zip(found.prompt.tokens, found.scores, strict=True) if t.text == "g"]
    assert len(set(repeated)) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("content", ["a", "ab"])
def test_very_short_prompts(llama: Subject, method: str, content: str) -> None:
    """One token has no other to be compared with: kernels divide by zero there."""
    found = asked(llama, method, content)
    scores = [s for s in found.scores if s is not None]
    assert len(scores) == len(content)
    if method in ("kernel_shap", "shapley_sampling", "feature_ablation") and len(content) == 1:
        assert scores[0] == pytest.approx(found.value - found.base_value, abs=1e-4)


@pytest.mark.parametrize("objective", [Objective((65,)), Objective((65, 40), is_normalized=True)])
@pytest.mark.parametrize("method", METHODS)
def test_one_answer_can_be_explained(llama: Subject, method: str, objective: Objective) -> None:
    """A method that only knows contrasts fails on the plainest question."""
    found = make(method, QUICK.get(method)).explain(toy_problem(llama, objective))
    assert float(found.values.abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_work_is_what_was_announced(llama: Subject, method: str) -> None:
    """A cost too small lets a long job into the queue and shows progress over 100 %."""
    steps: list[tuple[int, int]] = []
    found = asked(llama, method, progress=lambda done, total: steps.append((done, total)))
    announced = make(method, QUICK.get(method)).cost(12)
    spent = found.forward_rows + 2 * found.backward_rows - 2  # the two ends are attribute's own
    assert 0 < spent <= announced
    if method != "reagent":  # its chains may stop early
        assert spent == announced
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert {total for _, total in steps} == {announced + 2}


@pytest.mark.parametrize("method", ANY_MODEL)
@pytest.mark.parametrize("name", ["lfm2", "gemma3"])
def test_methods_work_on_models_with_and_without_a_tree(name: str, method: str) -> None:
    """A method that leans on the tree fails on every hybrid model."""
    found = asked(toy_subject(TOYS[name]()), method)
    assert found.max_abs > 0


@pytest.mark.parametrize("method", ["feature_ablation", "kernel_shap", "shapley_sampling"])
def test_masks_work_with_dropped_tokens(llama: Subject, method: str) -> None:
    """A method that reads embeddings of its own ignores the baseline it was given."""
    scores = {b: asked(llama, method, baseline=b).scores for b in ("zero", "drop", "mean")}
    assert len(set(scores.values())) == 3


@pytest.mark.parametrize("replacer", ["model", "uniform", "baseline"])
def test_reagent_gives_shares(llama: Subject, replacer: str) -> None:
    """Scores that are no distribution, or chains that never move, are not ReAGent's."""
    options = {"replacer": replacer, "steps": 6, "chains": 3}
    found = make("reagent", options).explain(toy_problem(llama))
    assert float(found.values.sum()) == pytest.approx(1, abs=1e-5)
    assert float(found.values.min()) > 0
    assert found.residual is None
    longer = make("reagent", {**options, "steps": 12, "tolerance": 0.0}).explain(toy_problem(llama))
    assert longer.facts == {"steps_taken": 12, "chains_stopped": 0}
    assert not torch.equal(longer.values, found.values)


def test_reagent_stops_when_little_is_enough(llama: Subject) -> None:
    """A stop rule that is never met, or met at once, wastes steps or returns the random start."""
    options = {"tolerance": 1.0, "keep": 0.99, "steps": 50}
    found = make("reagent", options).explain(toy_problem(llama))
    assert found.facts == {"steps_taken": 2, "chains_stopped": 5}


def test_unknown_names_and_options_are_refused() -> None:
    """An option that is silently ignored answers another question."""
    with pytest.raises(NotFoundError, match="Did you mean 'kernel_shap'"):
        make("kernel_shapp")
    for method in METHODS:
        with pytest.raises(DataError, match="no option 'smaples'"):
            make(method, {"smaples": 3})


@pytest.mark.parametrize(
    ("method", "options"), [(m, options) for m, bad in BAD_OPTIONS.items() for options in bad]
)
def test_values_out_of_range_are_refused(method: str, options: dict[str, Any]) -> None:
    """A million samples accepted here keep the server busy for a day."""
    with pytest.raises(AttributionError, match="expected") as refusal:
        make(method, options)
    assert refusal.value.param in {f"params.{name}" for name in options}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused(method: str) -> None:
    """NaN among the scores becomes a colour, or breaks the JSON."""
    subject = toy_subject()
    subject.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NonFiniteError):
        make(method, QUICK.get(method)).explain(toy_problem(subject))

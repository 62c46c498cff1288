"""F and its gradient are the model's own, for every architecture, baseline and form of answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_question import CONTRAST, toy_problem, toy_prompt, toy_subject
from toys import TOYS

from trimtab.attribution.errors import AttributionError, NonFiniteError
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import TokenKind, prompt_from_text
from trimtab.attribution.subject import Subject

OBJECTIVES = {
    "contrast": CONTRAST,
    "normalized": Objective(CONTRAST.preferred, CONTRAST.dispreferred, is_normalized=True),
    "one answer": Objective((65, 40, 83)),
    "one token": Objective((65,)),
    "one token each": Objective((65,), (70,)),
    "shared beginning": Objective((65, 40), (65, 41, 7)),
}
READ_ROWS = {"jamba", "lfm2", "mamba", "qwen3_next"}  # convolutions and states know no branches


@pytest.fixture(scope="module", params=TOYS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return toy_subject(TOYS[request.param]())


@pytest.fixture(scope="module")
def llama() -> Subject:
    return toy_subject()


def plain(
    problem: Problem, row: torch.Tensor, *, mask: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    """Return F and its gradient by running the model by itself, once for each answer."""
    subject, objective = problem.subject, problem.objective
    table = subject.model.get_input_embeddings()
    content = torch.tensor(problem.prompt.content)
    leaf = row.clone().requires_grad_()
    total = torch.zeros(())
    for sign, answer in zip((1, -1), objective.answers, strict=False):
        ids = torch.tensor([*problem.prompt.ids, *answer])
        embeddings = table(ids).index_copy(0, content, leaf).unsqueeze(0)
        extra: dict[str, Any] = {}
        if mask is not None:
            full = torch.cat([mask, torch.ones(len(answer))]).unsqueeze(0)
            extra = {"attention_mask": full, "position_ids": torch.arange(len(ids)).unsqueeze(0)}
        with torch.enable_grad():
            logits = subject.model(inputs_embeds=embeddings, use_cache=False, **extra).logits[0]
            n = len(answer)
            logprobs = logits[-n - 1 : -1].log_softmax(-1)
            own = logprobs[torch.arange(n), torch.tensor(answer)].sum()
            total = total + sign * own / (n if objective.is_normalized else 1)
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient


def assert_same(problem: Problem, rows: torch.Tensor) -> None:
    values, gradients = problem.gradients(rows)
    assert torch.allclose(problem.values(rows), values, atol=1e-5)
    for row, value, gradient in zip(rows, values, gradients, strict=True):
        own_value, own_gradient = plain(problem, row)
        assert float(value) == pytest.approx(own_value, abs=2e-5)
        apart = float((gradient - own_gradient).norm() / own_gradient.norm())
        assert apart < 1e-4


def test_the_models_read_a_tree_where_they_can(subject: Subject) -> None:
    """A wrong check would make every model slow, or give a state-space model's numbers unsaid."""
    is_expected = subject.model.config.model_type in READ_ROWS
    assert (subject.tree_problem is not None) == is_expected


def test_f_and_its_gradient_are_the_models_own(subject: Subject) -> None:
    """Branches that see each other, a wrong position or a shifted target change F a little."""
    problem = toy_problem(subject)
    halfway = (problem.inputs + problem.base) / 2
    assert_same(problem, torch.stack([problem.inputs, halfway]))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_every_form_of_answer(name: str, kind: str) -> None:
    """Answers of one token have no branch; a normalised one may be divided by the wrong length."""
    problem = toy_problem(toy_subject(TOYS[name]()), OBJECTIVES[kind])
    assert_same(problem, problem.inputs.unsqueeze(0))


def test_rows_are_independent(subject: Subject) -> None:
    """A row that leaks into its neighbour makes every mask's F depend on the batch."""
    problem = toy_problem(subject)
    keep = torch.rand(7, problem.n, generator=torch.Generator().manual_seed(0)) < 0.5
    together = problem.values_kept(keep)
    alone = torch.cat([problem.values_kept(row.unsqueeze(0)) for row in keep])
    assert float(together.std()) > 1e-3
    assert torch.allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("n_tokens", [1, 40, 10_000])
def test_slices_do_not_change_the_numbers(llama: Subject, n_tokens: int) -> None:
    """A slice's last rows dropped or doubled would shift every score after them."""
    cut = toy_problem(toy_subject(slice_tokens=n_tokens))
    keep = torch.eye(cut.n, dtype=torch.bool)
    assert torch.allclose(cut.values_kept(keep), toy_problem(llama).values_kept(keep), atol=2e-5)
    assert cut.forward_rows == cut.n


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("baseline", ["zero", "pad", "mean"])
def test_a_baseline_stands_in_for_the_token(name: str, baseline: str) -> None:
    """An embedding without the model's own scale (Gemma) is no embedding the model knows."""
    subject = toy_subject(TOYS[name]())
    problem = toy_problem(subject, baseline=baseline)
    model = subject.model
    everything = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    own = {
        "zero": torch.zeros(32),
        "pad": everything[subject.tokenizer.eos_token_id],  # the toy has no pad token
        "mean": everything.mean(0),
    }[baseline]
    assert torch.allclose(problem.base, own.expand(problem.n, -1), atol=1e-6)
    keep = torch.zeros(2, problem.n, dtype=torch.bool)
    keep[1, ::2] = True
    mixed = torch.where(keep[1].unsqueeze(1), problem.inputs, own)
    wanted = [plain(problem, row)[0] for row in (own.expand(problem.n, -1), mixed)]
    assert problem.values_kept(keep).tolist() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_dropped_token_is_attended_to_by_nothing(name: str) -> None:
    """A dropped token that is still seen, or that moves the others up, is not gone."""
    problem = toy_problem(toy_subject(TOYS[name]()), baseline="drop")
    keep = torch.ones(problem.n, dtype=torch.bool)
    keep[1:6:2] = False
    mask = torch.ones(len(problem.prompt.tokens))
    mask[torch.tensor(problem.prompt.content)[~keep]] = 0
    wanted, _ = plain(problem, problem.inputs, mask=mask)
    got = problem.values_kept(torch.stack([keep, torch.ones_like(keep)]))
    assert float(got[0]) == pytest.approx(wanted, abs=2e-5)
    assert float(got[1]) == pytest.approx(plain(problem, problem.inputs)[0], abs=2e-5)
    assert abs(float(got[0] - got[1])) > 1e-3
    # What a dropped token would have been does not matter any more.
    problem.inputs = torch.where(keep.unsqueeze(1), problem.inputs, 7.0)
    assert problem.values_kept(keep.unsqueeze(0)).tolist() == pytest.approx([wanted], abs=2e-5)


def test_drop_is_refused_where_it_means_nothing(llama: Subject) -> None:
    """Gradients along a path that does not exist, or a mask that a model ignores, look fine."""
    with pytest.raises(AttributionError, match="no path of embeddings"):
        toy_problem(llama, baseline="drop").gradients(torch.zeros(1, 12, 32))
    rows = toy_problem(toy_subject(TOYS["lfm2"]()), baseline="drop")
    with pytest.raises(AttributionError, match="cannot be asked this way"):
        rows.values_kept(torch.ones(1, rows.n, dtype=torch.bool))


def test_only_content_tokens_take_part(llama: Subject) -> None:
    """A template token in the path makes scores of words nobody wrote."""
    problem = toy_problem(llama)
    tokens = problem.prompt.tokens
    assert "".join(tokens[i].text for i in problem.prompt.content) == "a catyeswhy?"
    assert problem.n == 12
    assert sum(t.kind is TokenKind.TEXT for t in tokens) == 12
    assert problem.row_tokens < 2 * len(tokens)


def test_the_models_own_predictions(subject: Subject) -> None:
    """A place shifted by one would draw stand-ins for the token after."""
    problem = toy_problem(subject)
    ids = torch.tensor([problem.prompt.ids])
    with torch.no_grad():
        wanted = subject.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = [0, 3, 11]
    before = [problem.prompt.content[i] - 1 for i in places]
    assert torch.allclose(problem.predictions(places), wanted[before], atol=1e-4)


def test_what_stands_first_is_predicted_by_nothing(llama: Subject) -> None:
    """Without this the first token of a plain prompt is predicted from the last one."""
    problem = Problem(llama, prompt_from_text(llama.tokenizer, "ab"), CONTRAST)
    found = problem.predictions([0, 1])
    assert float(found[0].max() - found[0].min()) == 0
    assert torch.allclose(found.exp().sum(1), torch.ones(2))
    assert float(found[1].max() - found[1].min()) > 0.1


def test_what_is_not_finite_is_refused(llama: Subject) -> None:
    """NaN scores would be sent as if they were scores."""
    problem = toy_problem(llama)
    bad = problem.inputs.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        problem.values(bad.unsqueeze(0))
    with pytest.raises(NonFiniteError):
        problem.gradients(bad.unsqueeze(0))


def test_questions_that_cannot_be_asked(llama: Subject) -> None:
    """Past the context a model answers noise; without a word there is nothing to score."""
    with pytest.raises(AttributionError, match="attends to 512"):
        toy_problem(llama, contents=("x" * 500,))
    with pytest.raises(AttributionError, match="no word of its own"):
        Problem(llama, toy_prompt(llama, ""), CONTRAST)
    with pytest.raises(AttributionError, match="Did you mean 'zero'"):
        toy_problem(llama, baseline="zeros")
    with pytest.raises(AttributionError, match="same tokens"):
        Objective((1, 2), (1, 2))
    with pytest.raises(AttributionError, match="no token"):
        Objective(())

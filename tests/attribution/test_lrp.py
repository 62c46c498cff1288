"""AttnLRP equals relevance propagated rule by rule, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explicit_relevance import relevance
from toy_question import CONTRAST, toy_problem, toy_subject
from toys import SHAPE, TOYS, seeded
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.lrp import MODEL_TYPES, attn_lrp
from trimtab.attribution.methods.registry import make
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.subject import Subject


def of_type(name: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **SHAPE | changes)
    return seeded(type(AutoModelForCausalLM.from_config(config)), config)


KNOWN = {
    **{name: TOYS[name] for name in ("gemma3", "gpt2", "llama", "qwen3")},
    "mistral": lambda: of_type("mistral", sliding_window=16),
    "qwen2": lambda: of_type("qwen2"),
}
ACTIVATIONS = {"act_fn", "activation_fn"}
UNKNOWN = sorted(set(TOYS) - {*KNOWN, "gemma3_multimodal"})


@pytest.fixture(params=KNOWN)
def subject(request: pytest.FixtureRequest) -> Subject:
    return toy_subject(KNOWN[request.param]())


def by_the_rules(problem: Problem) -> torch.Tensor:
    """Relevance of the content tokens, `[n]`, float64: each answer by itself, then the sum."""
    prompt = problem.prompt.ids
    total = torch.zeros(problem.n, dtype=torch.float64)
    for sign, answer in zip((1, -1), problem.objective.answers, strict=False):

        def of_logits(
            logits: torch.Tensor, sign: int = sign, answer: tuple[int, ...] = answer
        ) -> torch.Tensor:
            found = torch.zeros_like(logits)
            for k, target in enumerate(answer):
                row = logits[len(prompt) - 1 + k]
                gradient = -row.softmax(-1)
                gradient[target] += 1
                found[len(prompt) - 1 + k] = sign * row * gradient
            return found

        ids = [*prompt, *answer[:-1]]
        logits, r = relevance(problem.subject.model, ids, of_logits)
        with torch.no_grad():
            own = problem.subject.model(torch.tensor([ids]), use_cache=False).logits[0]
        assert torch.allclose(logits.float(), own, atol=1e-4)  # the forward pass is the model's
        total += r[problem.prompt.content]
    return total


@pytest.mark.parametrize("objective", [CONTRAST, Objective((65, 40, 83)), Objective((65,))])
def test_attnlrp_is_relevance_by_the_rules(subject: Subject, objective: Objective) -> None:
    """A factor on the wrong side of a product changes the ranking and nothing else tells."""
    problem = toy_problem(subject, objective)
    found = make("attnlrp").explain(problem).values.double()
    wanted = by_the_rules(problem)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_attnlrp_is_not_the_gradient(subject: Subject) -> None:
    """Rules that silently reach no module leave plain gradient x input."""
    problem = toy_problem(subject)
    _, gradient = problem.gradients(problem.inputs.unsqueeze(0))
    plain = (gradient[0] * problem.inputs).sum(-1)
    found = make("attnlrp").explain(problem).values
    assert float((found - plain).norm() / plain.norm()) > 0.1


def test_numbers_inside_are_the_models_own(subject: Subject) -> None:
    """A forward pass that rounds differently explains an answer that was not given."""
    ids = torch.arange(3, 40).unsqueeze(0)
    plain = subject.model(ids).logits
    with attn_lrp(subject.model), torch.enable_grad():
        assert torch.equal(subject.model(ids).logits, plain)
    problem = toy_problem(subject)
    row = problem.inputs.unsqueeze(0)
    assert torch.equal(problem.gradients(row, is_lrp=True)[0], problem.gradients(row)[0])


def test_the_exact_gradient_comes_back(subject: Subject) -> None:
    """One rule left in place falsifies every gradient taken after it."""
    problem = toy_problem(subject)
    row = problem.inputs.unsqueeze(0)
    _, before = problem.gradients(row)
    make("attnlrp").explain(problem)
    with pytest.raises(ZeroDivisionError), attn_lrp(subject.model):
        raise ZeroDivisionError
    assert torch.equal(problem.gradients(row)[1], before)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_architectures_are_refused(name: str) -> None:
    """A gate or a state hidden in a module's forward gets no rule, and the scores look fine."""
    subject = toy_subject(TOYS[name]())
    assert subject.model.config.model_type not in MODEL_TYPES
    with pytest.raises(AttributionError, match="no rules for"):
        make("attnlrp").explain(toy_problem(subject))
    with pytest.raises(AttributionError, match="no rules for"), attn_lrp(subject.model):
        pass


@pytest.mark.parametrize("name", sorted(MODEL_TYPES - {"gemma3", "gpt2"}))
def test_the_rules_reach_every_part(name: str) -> None:
    """A norm or an activation under a name the rules do not look for keeps its own gradient."""
    model = of_type(name)
    n_layers = model.config.num_hidden_layers
    parts = {
        "norm": [m for m in model.modules() if "norm" in type(m).__name__.lower()],
        "activation": [m for n, m in model.named_modules() if n.rpartition(".")[2] in ACTIVATIONS],
        "product": [m for n, m in model.named_modules() if n.endswith("down_proj")],
    }
    assert len(parts["norm"]) > 2 * n_layers
    assert len(parts["activation"]) == len(parts["product"]) == n_layers
    with attn_lrp(model):
        for part in parts["norm"] + parts["activation"]:
            assert "forward" in vars(part)
        assert all(part._forward_pre_hooks for part in parts["product"])

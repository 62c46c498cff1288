"""F and its gradient under steering are those of the steered model."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy_question import toy_problem, toy_subject
from toys import TOYS, WIDTH

from trimtab.attribution.problem import Problem
from trimtab.attribution.subject import Subject
from trimtab.kernels import Classifier
from trimtab.steering.bank import Bank
from trimtab.steering.model.hooks import captured, steered
from trimtab.steering.plan import (
    Gate,
    Guide,
    LayerTerm,
    Part,
    Plan,
    Reader,
    additive_plan,
    fingerprint_of,
)
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.window import Window


def direction(seed: int) -> torch.Tensor:
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return row / row.norm()


def adding(seed: int, *, normalize: bool = False) -> LayerTerm:
    return LayerTerm(direction(seed) * 2, None, None, normalize)


def ablating(seed: int) -> LayerTerm:
    row = direction(seed).unsqueeze(0)
    return LayerTerm(None, row, row, False)


def guiding(seed: int, *, n_steps: int = 1) -> LayerTerm:
    g = torch.Generator().manual_seed(seed)
    sizes = (WIDTH, 12, 12, 3)
    pairs = [
        (torch.randn(m, n, generator=g) / n**0.5, torch.randn(m, generator=g))
        for n, m in itertools.pairwise(sizes)
    ]
    network = Classifier.of(pairs, is_exclusive=True)
    reader = Reader("tone", 0, network, ("a", "b", "c"), f"tone-{seed}")
    return LayerTerm(guides=(Guide(reader, (0,), (2,), (0.5,) * n_steps, loss="softmax"),))


def gate(layer: int, *, per_prompt: bool, seed: int = 9, intercept: float = 0.0) -> Gate:
    network = Classifier.of(
        [(3.0 * direction(seed).unsqueeze(0), torch.tensor([intercept]))], is_exclusive=False
    )
    reader = Reader("probe", layer, network, ("probe",), f"{seed}@{layer}/{intercept}")
    return Gate("probe", reader, 0, 0.5, True, per_prompt)


def plan(*parts: tuple[Window, Gate | None, dict[int, LayerTerm]]) -> Plan:
    made = tuple(Part.of(*part) for part in parts)
    return Plan(made, fingerprint_of(made), fingerprint_of(made))


ALL = Window()
PLANS = {
    "additive": plan((ALL, None, {0: adding(0), 1: adding(1)})),
    "norm": plan((ALL, None, {0: adding(0, normalize=True)})),
    "ablation": plan((ALL, None, {0: ablating(2), 1: ablating(3)})),
    "guidance": plan((ALL, None, {0: guiding(5), 1: guiding(6, n_steps=3)})),
    "guidance of the answer": plan((Window(prompt=False), None, {0: guiding(5, n_steps=2)})),
    "gated guidance": plan((ALL, gate(0, per_prompt=False), {0: guiding(5), 1: adding(0)})),
    "prompt only": plan((Window(generation=False), None, {0: adding(0)})),
    "answer only": plan((Window(prompt=False), None, {0: ablating(0)})),
    "after the first": plan((Window(prompt=False, after=1), None, {0: adding(0)})),
    "two first": plan((Window(prompt=False, first=2), None, {1: adding(0)})),
    "token gate": plan((ALL, gate(0, per_prompt=False), {0: ablating(2), 1: adding(0)})),
    "prompt gate": plan((ALL, gate(0, per_prompt=True), {0: adding(0), 1: ablating(1)})),
    "prompt gate open": plan((ALL, gate(0, per_prompt=True, intercept=50.0), {0: adding(0)})),
    "prompt gate shut": plan((ALL, gate(0, per_prompt=True, intercept=-50.0), {0: adding(0)})),
    "two gates": plan(
        (ALL, gate(0, per_prompt=False), {0: ablating(2), 1: ablating(3)}),
        (ALL, gate(1, per_prompt=False, seed=8), {1: ablating(4)}),
    ),
}


def alone(problem: Problem, *, gradient: bool = True) -> tuple[float, torch.Tensor]:
    """Return F and its gradient from a steered pass of each answer by itself."""
    subject = problem.subject
    assert problem.plan is not None
    bank = Bank(n_layers=len(subject.layers), hidden_size=WIDTH)
    lease = bank.acquire(problem.plan)
    assert lease is not None
    leaf = problem.inputs.clone().requires_grad_()
    content = torch.tensor(problem.prompt.content)
    n_prompt = len(problem.prompt.ids)
    total = torch.zeros(())
    for sign, answer in zip((1, -1), problem.objective.answers, strict=False):
        ids = torch.tensor([*problem.prompt.ids, *answer])
        table = subject.model.get_input_embeddings()
        step = SteerStep(bank, [Span(len(ids), 0, SteeredRequest(lease, n_prompt))])
        with torch.enable_grad(), steered(subject.layers, step):
            tokens = table(ids).index_copy(0, content, leaf).unsqueeze(0)
            logits = subject.model(inputs_embeds=tokens, use_cache=False).logits[0]
            logprobs = logits[n_prompt - 1 : -1].log_softmax(-1)
            total = total + sign * logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum()
    (found,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), found


@pytest.fixture(scope="module", params=["llama", "gpt2", "lfm2"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return toy_subject(TOYS[request.param]())


@pytest.mark.parametrize("name", PLANS)
def test_steering_acts_as_in_a_request(subject: Subject, name: str) -> None:
    """Steering at tree positions, or only on the trunk, explains a model nobody is served by."""
    problem = toy_problem(subject, plan=PLANS[name])
    rows = torch.stack([problem.inputs, problem.base])
    values, gradients = problem.gradients(rows)
    wanted, gradient = alone(problem)
    assert float(values[0]) == pytest.approx(wanted, abs=2e-5)
    assert float(problem.values(rows)[0]) == pytest.approx(wanted, abs=2e-5)
    assert float((gradients[0] - gradient).norm() / gradient.norm()) < 1e-4
    unsteered = toy_problem(subject).values(rows)
    if name != "prompt gate":  # that one may be open or shut
        assert (abs(float(unsteered[0]) - wanted) < 1e-5) == (name == "prompt gate shut")


def test_a_gate_decides_for_each_row(subject: Subject) -> None:
    """A decision latched for the first row and used for all rows hides what opens the gate."""
    problem = toy_problem(subject)
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(16, *problem.inputs.shape, generator=g)
    prompt = subject.embeddings(problem.prompt.ids).expand(16, -1, -1)
    prompt = prompt.index_copy(1, torch.tensor(problem.prompt.content), rows)
    with torch.no_grad(), captured(subject.layers, [0]) as states:
        subject.model(inputs_embeds=prompt, use_cache=False)
    middle = float((states[0][:, 1:].mean(1) @ direction(9)).median())
    half_open = plan((ALL, gate(0, per_prompt=True, intercept=-3.0 * middle), {0: adding(0)}))
    problem = toy_problem(subject, plan=half_open)
    together = problem.values(rows)
    separately = torch.cat([problem.values(row.unsqueeze(0)) for row in rows])
    assert torch.allclose(together, separately, atol=2e-5)
    is_shut = (together - toy_problem(subject).values(rows)).abs() < 1e-5
    assert 4 <= int(is_shut.sum()) <= 12


def test_an_empty_plan_is_no_steering(subject: Subject) -> None:
    """A plan whose terms have scale 0 must leave the bank and the result alone."""
    problem = toy_problem(subject, plan=additive_plan({}))
    assert problem.plan is None
    assert torch.equal(
        problem.values(problem.inputs.unsqueeze(0)),
        toy_problem(subject).values(problem.inputs.unsqueeze(0)),
    )

"""An attribution leaves the model as it found it, whether it ends well or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_question import toy_problem, toy_subject
from toys import TOYS, WIDTH

from trimtab.attribution import tree
from trimtab.attribution.errors import CancelledError
from trimtab.attribution.problem import Problem
from trimtab.attribution.subject import Subject
from trimtab.steering.plan import additive_plan

PLAN = additive_plan({0: torch.ones(WIDTH)})
WORK: dict[str, Callable[[Problem], Any]] = {
    "values": lambda p: p.values(p.inputs.unsqueeze(0)),
    "masks": lambda p: p.values_kept(torch.ones(3, p.n, dtype=torch.bool)),
    "gradient": lambda p: p.gradients(p.inputs.unsqueeze(0)),
    "attnlrp": lambda p: p.gradients(p.inputs.unsqueeze(0), is_lrp=True),
    "predictions": lambda p: p.predictions([0, 1]),
}


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return toy_subject(TOYS[request.param]())


def state_of(subject: Subject) -> dict[str, Any]:
    """Everything an attribution touches on its way."""
    modules = list(subject.model.modules())
    hooks = [
        len(hooks)
        for m in modules
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]
    return {
        "hooks": hooks,
        "own forward": [name for name, m in subject.model.named_modules() if "forward" in vars(m)],
        "training": [m.training for m in modules],
        "attention": [config._attn_implementation for config in subject.configs],
        "parameters": [(p.requires_grad, p.grad is None) for p in subject.model.parameters()],
        "slots": subject.bank.n_live,
        "tree": getattr(tree._active, "tree", None) is None,
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def logits_of(subject: Subject) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = subject.model(torch.arange(3, 40).unsqueeze(0)).logits
    return logits


@pytest.mark.parametrize("work", WORK)
def test_after_success(subject: Subject, work: str) -> None:
    """A hook, a patched forward or an attention function left behind changes every request."""
    before, logits = state_of(subject), logits_of(subject)
    WORK[work](toy_problem(subject, plan=PLAN))
    assert state_of(subject) == before
    assert torch.equal(logits_of(subject), logits)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_after_an_error_inside_the_model(
    subject: Subject, work: str, error: type[BaseException]
) -> None:
    """Restoring only at the end of a good run leaves a broken model behind the first error."""
    problem = toy_problem(subject, plan=PLAN)
    before, logits = state_of(subject), logits_of(subject)

    def fail(*_: Any) -> None:
        raise error("no")

    handle = subject.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            WORK[work](problem)
    finally:
        handle.remove()
    assert state_of(subject) == before
    assert torch.equal(logits_of(subject), logits)
    WORK[work](problem)  # and it can be asked again


@pytest.mark.parametrize("work", ["gradient", "attnlrp"])
def test_after_an_error_in_the_backward_pass(subject: Subject, work: str) -> None:
    """The backward pass runs inside the patched model too."""
    before, logits = state_of(subject), logits_of(subject)

    def fail(*_: Any) -> None:
        raise RuntimeError("no gradient")

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(fail)

    handle = subject.layers[0].register_forward_hook(watch)
    try:
        with pytest.raises(RuntimeError, match="no gradient"):
            WORK[work](toy_problem(subject, plan=PLAN))
    finally:
        handle.remove()
    assert state_of(subject) == before
    assert torch.equal(logits_of(subject), logits)


def test_after_being_called_off(subject: Subject) -> None:
    """A cancelled attribution that has taken a slot of the bank never gives it back."""
    before = state_of(subject)
    calls = []

    def slices(work: Callable[[], Any]) -> Any:
        calls.append(work)
        if len(calls) > 2:
            raise CancelledError("called off")
        return work()

    problem = toy_problem(subject, plan=PLAN, slices=slices)
    with pytest.raises(CancelledError):
        problem.values_kept(torch.ones(500, problem.n, dtype=torch.bool))
    assert state_of(subject) == before


def test_a_forward_of_its_own_is_put_back(subject: Subject) -> None:
    """Libraries that place a model on devices patch `forward` too; theirs must survive ours."""
    norms = [m for m in subject.model.modules() if "Norm" in type(m).__name__]
    own = norms[0].forward
    norms[0].forward = lambda *a, **k: own(*a, **k)
    patched = norms[0].forward
    try:
        WORK["attnlrp"](toy_problem(subject))
        assert vars(norms[0])["forward"] is patched
    finally:
        del norms[0].forward


def test_no_parameter_gets_a_gradient(subject: Subject) -> None:
    """Gradients of 135 million weights take their memory and are never freed."""
    problem = toy_problem(subject)
    _, gradient = problem.gradients(problem.inputs.unsqueeze(0))
    assert not gradient.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in subject.model.parameters())

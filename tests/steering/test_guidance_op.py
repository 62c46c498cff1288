"""Guidance in closed form against autograd, step by step as algorithms 1 and 2 are written.

Every test runs the plain torch reference and the Triton kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_device import IMPLEMENTATIONS, implemented, on_device
from torch.nn import functional as F

from trimtab import kernels
from trimtab.kernels import Classifier, Goals, probabilities, read

guide = on_device(kernels.guide)

WIDTH, HIDDEN, LABELS = 48, 24, 5
# Of the change's RMS: float32 arithmetic; below that one rounding of the result, of |h|'s size.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}
NEVER = 2.0


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    with implemented(request.param, device):
        yield request.param


def network(*, is_linear: bool = False, is_exclusive: bool = True) -> Classifier:
    g = torch.Generator().manual_seed(3)
    widths = [WIDTH, LABELS] if is_linear else [WIDTH, HIDDEN, HIDDEN, LABELS]
    layers = []
    for i in range(len(widths) - 1):
        weight = torch.randn(widths[i + 1], widths[i], generator=g) / widths[i] ** 0.5
        layers.append((weight, 0.3 * torch.randn(widths[i + 1], generator=g)))
    return Classifier.of(layers, is_exclusive=is_exclusive)


def states(n: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return (2 * torch.randn(n, WIDTH, generator=g)).to(dtype)


def goals(n: int, sizes: list[float], **changes: Any) -> Goals:
    """Goals that differ from token to token, the third without a T-, the fourth without a T+."""
    g = torch.Generator().manual_seed(7)
    order = torch.rand(n, LABELS, generator=g).argsort(1)
    toward = torch.zeros(n, LABELS, dtype=torch.bool)
    away = toward.clone()
    for t in range(n):
        toward[t, order[t, : 1 + t % 2]] = True
        away[t, order[t, 2 : 3 + t % 2]] = True
    toward[3:4] = False
    away[2:3] = False
    made: dict[str, Any] = {
        "toward": toward,
        "away": away,
        "sizes": torch.tensor(sizes).expand(n, -1).clone(),
        "picks_rival": torch.zeros(n, dtype=torch.bool),
        "until": torch.full((n,), NEVER),
        "keeps_norm": torch.zeros(n, dtype=torch.bool),
    }
    return Goals(**made | changes)


def logits_of(h: torch.Tensor, c: Classifier) -> torch.Tensor:
    """The network as torch users write it."""
    parts = [p if p is None else p.to(h.dtype) for p in (c.w_mid, c.b_mid, c.w_out, c.b_out)]
    z = F.linear(h, c.w_in.to(h.dtype), c.b_in.to(h.dtype))
    if parts[0] is None:
        return z
    return F.linear(F.linear(z.relu(), parts[0], parts[1]).relu(), parts[2], parts[3])


def mean_over(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (values * labels).sum(1) / labels.sum(1).clamp_min(1)


def loss_of(h: torch.Tensor, c: Classifier, goal: Goals, loss: str) -> torch.Tensor:
    o = logits_of(h, c)
    if loss == "logits":
        return mean_over(o, goal.away) - mean_over(o, goal.toward)
    if loss == "softmax":
        p = o.log_softmax(1)
        return mean_over(p, goal.away) - mean_over(p, goal.toward)
    return -mean_over(F.logsigmoid(o), goal.toward) - mean_over(F.logsigmoid(-o), goal.away)


def by_autograd(h: torch.Tensor, c: Classifier, goal: Goals, loss: str, step: str) -> torch.Tensor:
    """Algorithms 1 and 2 in float64, one token's step after the other."""
    a = h.double()
    for k in range(goal.sizes.shape[1]):
        a = a.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(a, c, goal, loss).sum(), a)
        alpha = goal.sizes[:, k : k + 1].double()
        squared = grad.pow(2).sum(1, keepdim=True)
        if step == "unit":
            alpha = alpha / squared.sqrt().clamp_min(1e-30)
        elif step == "reflect":
            alpha = 2 * alpha * (a * grad).sum(1, keepdim=True) / squared.clamp_min(1e-30)
        a = a - alpha * grad
    return a.detach()


def apart(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor) -> float:
    """Distance from what is right, relative to the change."""
    return float((got.double() - want).norm() / (want - before.double()).norm())


@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("step", ["unit", "bare", "reflect"])
@pytest.mark.parametrize("loss", ["logits", "softmax", "sigmoid"])
@pytest.mark.parametrize("is_linear", [False, True])
def test_closed_form_is_the_gradient(is_linear: bool, loss: str, step: str, n_steps: int) -> None:
    """A step that forgets how the ones before moved z, a mean over the wrong labels."""
    c, h = network(is_linear=is_linear), states(9)
    goal = goals(9, [0.7 * 0.9**k for k in range(n_steps)])
    want = by_autograd(h, c, goal, loss, step)
    got = guide(h, c, goal, loss=loss, step=step)
    assert apart(got, want, h) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_half_precision_rounds_once(loss: str, dtype: torch.dtype) -> None:
    """Steps taken in the model's own type lose what a small step adds."""
    c, h = network(), states(16, dtype=dtype)
    goal = goals(16, [0.5, 0.4, 0.3])
    want = by_autograd(h, c, goal, loss, "unit")
    got = guide(h, c, goal, loss=loss)
    assert got.dtype == dtype
    assert apart(got, want, h) < BOUNDS[dtype]
    assert torch.equal(got, guide(h.float(), c, goal, loss=loss).to(dtype))


def test_steps_and_decay_are_algorithm_1() -> None:
    """Alpha is decayed before the first step, or once too often."""
    c, h = network(), states(6)
    alpha, gamma = 0.4, 0.5
    at_once = guide(h, c, goals(6, [alpha * gamma**k for k in range(3)]), step="bare")
    by_hand = h
    for k in range(3):
        by_hand = guide(by_hand, c, goals(6, [alpha * gamma**k]), step="bare")
    assert torch.allclose(at_once, by_hand, atol=1e-6)


def test_a_unit_step_has_its_length() -> None:
    """A dose that depends on how steep the classifier happens to be is no dose."""
    h = states(8)
    moved = guide(h, network(), goals(8, [0.8])) - h
    assert torch.allclose(moved.norm(dim=1), torch.full((8,), 0.8), atol=1e-5)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_size_0_is_bit_identical(dtype: torch.dtype) -> None:
    """A token that is only cast to float32 and back, or whose norm is restored, changes bits."""
    h = states(7, dtype=dtype)
    goal = goals(7, [0.5, 0.5], keeps_norm=torch.ones(7, dtype=torch.bool))
    goal.sizes[[1, 4]] = 0
    got = guide(h, network(), goal)
    assert torch.equal(got[[1, 4]], h[[1, 4]])
    assert not torch.equal(got[[0, 2]], h[[0, 2]])


def test_tokens_are_guided_alone() -> None:
    """The published hook averages over the sequence: a neighbour's labels change the step."""
    c, h, goal = network(), states(9), goals(9, [0.6, 0.6, 0.6])
    together = guide(h, c, goal)
    for t in (0, 3, 8):
        own = Goals(*(getattr(goal, f)[t : t + 1] for f in Goals.__dataclass_fields__))
        assert torch.allclose(guide(h[t : t + 1], c, own), together[t : t + 1], atol=1e-6)


def test_guidance_moves_the_labels() -> None:
    """A sign error steers away from the target."""
    c, h = network(), states(64)
    goal = goals(64, [0.5])
    has_both = goal.toward.any(1) & goal.away.any(1)
    before, after = (logits_of(x, c) for x in (h, guide(h, c, goal)))
    gain = [mean_over(o, goal.toward) - mean_over(o, goal.away) for o in (before, after)]
    assert bool((gain[1] > gain[0])[has_both].all())


def test_the_rival_is_found_anew() -> None:
    """A rival fixed at the first step is left behind once another label overtakes it."""
    c, h = network(), states(40)
    nobody = torch.zeros(40, LABELS, dtype=torch.bool)
    target = nobody.clone()
    target[:, 2] = True
    rival = torch.ones(40, dtype=torch.bool)
    shared = {"toward": target, "away": nobody}
    got = guide(h, c, goals(40, [1.5, 1.5], picks_rival=rival, **shared))
    by_hand, chosen = h, []
    for _ in range(2):
        others = logits_of(by_hand, c).masked_fill(target, -torch.inf)
        away = F.one_hot(others.argmax(1), LABELS).bool()
        chosen.append(others.argmax(1))
        by_hand = guide(by_hand, c, goals(40, [1.5], toward=target, away=away))
    assert torch.allclose(got, by_hand, atol=1e-5)
    assert not torch.equal(chosen[0], chosen[1])  # or the test would not see a fixed rival


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_steps_end_where_the_target_is_likely(is_exclusive: bool) -> None:
    """Steering on after the target is reached is what breaks text."""
    c, h = network(is_exclusive=is_exclusive), states(16)
    target = torch.zeros(16, LABELS, dtype=torch.bool)
    target[:, 1] = True
    nobody = torch.zeros_like(target)
    p = probabilities(read(h, c), c)[:, 1]
    until = p.sort().values[7:9].mean().expand(16)  # no token is on the border
    goal = goals(16, [0.5] * 6, toward=target, away=nobody, until=until)
    got = guide(h, c, goal, loss="softmax")
    was_likely = p >= until
    assert torch.equal(got[was_likely], h[was_likely])
    after = probabilities(read(got, c), c)[:, 1]
    assert bool((after[~was_likely] > p[~was_likely]).all())
    lengths = (got - h).norm(dim=1)
    free = (guide(h, c, goals(16, [0.5] * 6, toward=target, away=nobody), loss="softmax") - h).norm(
        dim=1
    )
    assert bool((lengths < free - 0.4).any())


def test_norms_are_kept() -> None:
    """The norm of the whole batch, or of the sequence, is not the token's."""
    h = states(8)
    goal = goals(8, [1.0, 1.0], keeps_norm=torch.tensor([True, False] * 4))
    got = guide(h, network(), goal)
    before, after = h.norm(dim=1), got.norm(dim=1)
    assert torch.allclose(before[::2], after[::2], rtol=1e-5)
    assert bool(((before - after).abs() > 1e-3)[1::2].all())


def test_a_reflection_keeps_the_norm_and_flips_the_component() -> None:
    """Half a reflection is a projection; the factor 2 is algorithm 2's."""
    c, h = network(is_linear=True), states(6)
    away = torch.zeros(6, LABELS, dtype=torch.bool)
    away[:, 3] = True
    goal = goals(6, [1.0], toward=torch.zeros_like(away), away=away)
    got = guide(h, c, goal, step="reflect")
    assert torch.allclose(got.norm(dim=1), h.norm(dim=1), rtol=1e-5)
    assert torch.allclose(got @ c.w_in[3], -(h @ c.w_in[3]), atol=1e-4)
    gone = guide(h, c, goals(6, [0.5], toward=goal.toward, away=away), step="reflect")
    assert torch.allclose(gone @ c.w_in[3], torch.zeros(6), atol=1e-4)


@pytest.mark.parametrize("widths", [(300, 70, 40, 3), (40, 33, 34, 64), (33, 65)], ids=str)
def test_layers_of_any_width(widths: tuple[int, ...]) -> None:
    """A layer's units after the first block of 32 left out, or read from beyond its end."""
    g = torch.Generator().manual_seed(5)
    layers = [
        (torch.randn(m, n, generator=g) / n**0.5, 0.3 * torch.randn(m, generator=g))
        for n, m in itertools.pairwise(widths)
    ]
    c = Classifier.of(layers, is_exclusive=True)
    # Strided, as a view of a wider state.
    h = (2 * torch.randn(17, 2 * widths[0], generator=g))[:, ::2]
    labels = torch.rand(17, widths[-1], generator=g)
    some = {"toward": labels > 0.7, "away": labels < 0.2, "keeps_norm": labels[:, 0] > 0.5}
    goal = goals(17, [0.7, 0.5], **some)
    want = by_autograd(h, c, goal, "softmax", "unit")
    kept = want * (h.norm(dim=1) / want.norm(dim=1)).unsqueeze(1)
    want = torch.where(goal.keeps_norm.unsqueeze(1), kept, want)
    assert apart(guide(h, c, goal, loss="softmax"), want, h) < 2e-5


def test_a_flat_classifier_moves_nothing() -> None:
    """A gradient of zero divided by its length is NaN, and NaN reaches every later token."""
    c = Classifier.of(
        [(torch.zeros(HIDDEN, WIDTH), -torch.ones(HIDDEN)),
         (torch.zeros(HIDDEN, HIDDEN), -torch.ones(HIDDEN)),
         (torch.zeros(LABELS, HIDDEN), torch.zeros(LABELS))],
        is_exclusive=True,
    )  # fmt: skip
    h = states(5)
    for step in ("unit", "bare", "reflect"):
        assert torch.equal(guide(h, c, goals(5, [1.0]), step=step), h)


def test_no_tokens_and_wide_layers() -> None:
    """An empty chunk, and shapes that do not follow one another."""
    assert guide(states(0), network(), goals(0, [1.0])).shape == (0, WIDTH)
    with pytest.raises(ValueError, match="one or three"):
        Classifier.of([(torch.zeros(2, 3), torch.zeros(2))] * 2, is_exclusive=True)
    with pytest.raises(ValueError, match="weight"):
        Classifier.of([(torch.zeros(2, 3), torch.zeros(2))] * 3, is_exclusive=True)


def test_reading_equals_the_network() -> None:
    """Probes read with other weights than guidance follows."""
    h = states(6)
    for is_linear in (True, False):
        c = network(is_linear=is_linear)
        assert torch.allclose(read(h, c), logits_of(h, c), atol=1e-5)
    assert torch.allclose(probabilities(read(h, c), c).sum(1), torch.ones(6))

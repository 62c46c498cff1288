"""Classifier guidance: steps down the gradient of a small classifier, in closed form.

The classifier is a linear map into a narrow space followed by a head: z = W h + b, o = head(z). A
step h <- h - a W^T u with u = dL/dz moves z by -a G u, where G = W W^T. So all steps are taken in
the narrow space; the wide state is read once and written once, whatever the number of steps:

    |W^T u|^2 = u^T G u        h . W^T u = (z - b) . u         need no further pass either

Source: K-Steering, arXiv 2505.24535, algorithms 1 (steps) and 2 (reflection).
Differs: the published code averages logits over the sequence before it takes the gradient, so a
prompt of S tokens is steered 1/S as much as a generated one; here every token is steered by its own
logits, and by default by a given length whatever the gradient's.

This file is the plain torch reference: the specification, the CPU path and the tests' oracle. On a
CUDA device `guidance_triton.py` takes all steps in one launch and applies them in another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from trimtab.kernels.dispatch import MAX_WIDTH, runs_triton

Loss = Literal["logits", "softmax", "sigmoid"]
Step = Literal["unit", "bare", "reflect"]

_TINY = 1e-30  # a squared gradient not above it has no direction


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier, or one with two hidden ReLU layers, all float32.

    Attributes:
        w_in: `[d_in, d_model]`; of a linear classifier the labels' own rows.
        b_in: `[d_in]`.
        gram: `w_in @ w_in.T`, `[d_in, d_in]`.
        is_exclusive: whether a token has one label (softmax) or any number of them (sigmoid).
        w_mid, b_mid: `[d_mid, d_in]`, `[d_mid]`; None if it is linear.
        w_out, b_out: `[n_labels, d_mid]`, `[n_labels]`; None likewise.
    """

    w_in: torch.Tensor
    b_in: torch.Tensor
    gram: torch.Tensor
    is_exclusive: bool
    w_mid: torch.Tensor | None = None
    b_mid: torch.Tensor | None = None
    w_out: torch.Tensor | None = None
    b_out: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layers: list[tuple[torch.Tensor, torch.Tensor]], *, is_exclusive: bool
    ) -> Classifier:
        """Return one made of the (weight, bias) of one or three linear layers.

        Raises:
            ValueError: another number of layers, or shapes that do not follow one another.
        """
        if len(layers) not in (1, 3):
            raise ValueError(f"a classifier has one or three linear layers, not {len(layers)}")
        width = layers[0][0].shape[1]
        for weight, bias in layers:
            if weight.shape != (len(bias), width):
                raise ValueError(f"weight {tuple(weight.shape)} after {width} and {len(bias)}")
            width = len(bias)
        parts = [part.detach().float() for layer in layers for part in layer]
        return cls(parts[0], parts[1], parts[0] @ parts[0].T, is_exclusive, *parts[2:])

    @property
    def n_labels(self) -> int:
        """Labels."""
        return len(self.b_in if self.b_out is None else self.b_out)

    def to(self, device: torch.device) -> Classifier:
        """Return it on a device."""
        moved = [
            None if part is None else part.to(device)
            for part in (self.w_mid, self.b_mid, self.w_out, self.b_out)
        ]
        w_in, b_in, gram = (part.to(device) for part in (self.w_in, self.b_in, self.gram))
        return Classifier(w_in, b_in, gram, self.is_exclusive, *moved)


@dataclass(frozen=True, eq=False)
class Pull:
    """What labels ask for: the part of dL/do that is the same wherever a token stands.

    `positive` is 1/n at each of T+'s n labels, `both` adds T-'s, `change` is T-'s less T+'s, all
    `[n_tokens, n_labels]`; `balance` is `change` summed over labels, `[n_tokens, 1]`.
    """

    positive: torch.Tensor
    both: torch.Tensor
    change: torch.Tensor
    balance: torch.Tensor

    @classmethod
    def of(cls, toward: torch.Tensor, away: torch.Tensor) -> Pull:
        positive, negative = _share(toward), _share(away)
        change = negative - positive
        return cls(positive, positive + negative, change, change.sum(1, keepdim=True))

    def slope(self, logits: torch.Tensor, loss: Loss) -> torch.Tensor:
        """Return dL/do of each token, `[n_tokens, n_labels]`."""
        if loss == "logits":
            return self.change
        if loss == "sigmoid":
            return torch.addcmul(-self.positive, logits.sigmoid(), self.both)
        return torch.addcmul(self.change, logits.softmax(1), self.balance, value=-1)


@dataclass(frozen=True, eq=False)
class Goals:
    """Where each token is to be steered, and how far.

    Attributes:
        toward: labels to steer toward, T+, `[n_tokens, n_labels]`, bool.
        away: labels to steer away from, T-, the same shape; either may be empty.
        sizes: of each step, `[n_tokens, n_steps]`, float32; 0 takes none.
        picks_rival: whether the likeliest label outside T+ joins T- at every step, `[n_tokens]`,
            bool.
        until: no further step where T+ is at least this likely and T- at most one minus it,
            `[n_tokens]`, float32; over 1 never stops.
        keeps_norm: whether |h| is restored afterwards, `[n_tokens]`, bool.
    """

    toward: torch.Tensor
    away: torch.Tensor
    sizes: torch.Tensor
    picks_rival: torch.Tensor
    until: torch.Tensor
    keeps_norm: torch.Tensor

    @cached_property
    def pull(self) -> Pull:
        """What the labels ask for wherever a token stands."""
        return Pull.of(self.toward, self.away)

    def times(self, gates: torch.Tensor) -> Goals:
        """Return the goals with their steps scaled by `gates`, `[n_tokens, 1]`, float32."""
        return replace(self, sizes=self.sizes * gates)


def read(hidden: torch.Tensor, classifier: Classifier) -> torch.Tensor:
    """Return each token's logits.

    Args:
        hidden: `[n_tokens, d_model]`, any floating dtype.
        classifier: reads them.

    Returns:
        `[n_tokens, n_labels]`, float32.
    """
    return _head(torch.addmm(classifier.b_in, hidden.float(), classifier.w_in.T), classifier)[0]


def probabilities(logits: torch.Tensor, classifier: Classifier) -> torch.Tensor:
    """Return labels' probabilities from `read`'s logits, of the same shape."""
    return logits.softmax(-1) if classifier.is_exclusive else logits.sigmoid()


def guide(
    hidden: torch.Tensor,
    classifier: Classifier,
    goals: Goals,
    *,
    loss: Loss = "logits",
    step: Step = "unit",
    has_rival: bool = True,
    has_until: bool = True,
    has_norm: bool = True,
    has_still: bool = True,
) -> torch.Tensor:
    """Return hidden states after the goals' steps down the gradient g of the loss.

        logits     mean over T- of o  -  mean over T+ of o            (the source's)
        softmax    mean over T- of log p  -  mean over T+ of log p,   p = softmax(o)
        sigmoid    - mean over T+ of log s(o)  -  mean over T- of log(1 - s(o))

    A step of size a is one of

        unit       h - a g / |g|
        bare       h - a g                      (algorithm 1; sizes are its alpha_k)
        reflect    h - 2 a (h . g) / |g|^2 g    (algorithm 2 at a = 1; 1/2 takes g's share out)

    Args:
        hidden: residual stream, `[n_tokens, d_model]`, any floating dtype.
        classifier: whose gradient is followed.
        goals: labels and steps of each token.
        loss: which.
        step: which.
        has_rival: False skips the rival where no goal picks one.
        has_until: False skips the stop where no goal has one.
        has_norm: False skips the norm where no goal keeps it.
        has_still: False where every token has a step, so that none need stay bit by bit.

    Returns:
        `[n_tokens, d_model]` in `hidden`'s dtype. Arithmetic is float32 with one cast at the end;
        a token whose sizes are all 0 is returned bit by bit.
    """
    h = hidden.float()
    z = torch.addmm(classifier.b_in, h, classifier.w_in.T)
    how = _How(loss, step, has_rival, has_until)
    if runs_triton(hidden, z) and hidden.shape[1] <= MAX_WIDTH:
        from trimtab.kernels import guidance_triton

        total = _fused_total(z, classifier, goals, how)
        return guidance_triton.apply(
            hidden,
            total,
            w_in=classifier.w_in,
            sizes=goals.sizes,
            keeps_norm=goals.keeps_norm if has_norm else None,
        )
    total = _total(z, classifier, goals, how)
    guided = torch.addmm(h, total, classifier.w_in, alpha=-1)
    if has_norm:
        guided = torch.where(goals.keeps_norm.unsqueeze(1), _with_norm_of(h, guided), guided)
    guided = guided.to(hidden.dtype)
    if has_still:
        guided = torch.where((goals.sizes == 0).all(1, keepdim=True), hidden, guided)
    return guided


@dataclass(frozen=True)
class _How:
    """How steps are taken, as `guide` takes it."""

    loss: Loss
    step: Step
    has_rival: bool
    has_until: bool


def _fused_total(z: torch.Tensor, classifier: Classifier, goals: Goals, how: _How) -> torch.Tensor:
    """Return `_total` by one launch, or by torch's many where there are too many labels."""
    from trimtab.kernels import guidance_triton

    middle = (classifier.w_mid, classifier.b_mid, classifier.w_out, classifier.b_out)
    if classifier.n_labels > guidance_triton.MOST_LABELS:
        return _total(z, classifier, goals, how)
    return guidance_triton.steps(
        z,
        b_in=classifier.b_in,
        gram=classifier.gram,
        middle=middle,
        toward=goals.toward,
        away=goals.away,
        sizes=goals.sizes,
        picks_rival=goals.picks_rival,
        until=goals.until,
        is_exclusive=classifier.is_exclusive,
        **vars(how),
    )


def _total(z: torch.Tensor, classifier: Classifier, goals: Goals, how: _How) -> torch.Tensor:
    """Return the sum of all steps in the classifier's narrow space, `[n_tokens, d_in]`."""
    total = torch.zeros_like(z)
    away, pull = goals.away, goals.pull
    # Few and fused calls: between two passes of a model a small call costs 20 us, whatever it does.
    n_steps = goals.sizes.shape[1]
    for k in range(n_steps):
        logits, above_in, above_mid = _head(z, classifier)
        if how.has_rival:
            away = _with_rival(goals, logits)
            pull = Pull.of(goals.toward, away)
        u = _pulled_back(pull.slope(logits, how.loss), classifier, above_in, above_mid)
        moved = u @ classifier.gram
        size = goals.sizes[:, k : k + 1]
        if how.step != "bare":
            # Where the gradient vanishes u is zero, and so is any multiple of it.
            squared = torch.linalg.vecdot(u, moved).clamp_min(_TINY).unsqueeze(1)
            if how.step == "unit":
                size = size * squared.rsqrt()
            else:
                along = torch.linalg.vecdot(z - classifier.b_in, u).unsqueeze(1)
                size = size * 2 * along / squared
        if how.has_until:
            size = torch.where(_is_satisfied(logits, goals, away, classifier), 0.0, size)
        total = torch.addcmul(total, size, u)
        if k + 1 < n_steps:
            z = torch.addcmul(z, size, moved, value=-1)
    return total


def _head(
    z: torch.Tensor, classifier: Classifier
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return logits and which units of the two hidden layers are above zero."""
    if classifier.w_mid is None or classifier.w_out is None:
        return z, None, None
    assert classifier.b_mid is not None
    assert classifier.b_out is not None
    middle = torch.addmm(classifier.b_mid, z.relu(), classifier.w_mid.T)
    logits = torch.addmm(classifier.b_out, middle.relu(), classifier.w_out.T)
    return logits, z > 0, middle > 0


def _pulled_back(
    slope: torch.Tensor,
    classifier: Classifier,
    above_in: torch.Tensor | None,
    above_mid: torch.Tensor | None,
) -> torch.Tensor:
    """Return dL/dz from dL/do, `[n_tokens, d_in]`."""
    if classifier.w_mid is None or classifier.w_out is None:
        return slope
    assert above_in is not None
    assert above_mid is not None
    return ((slope @ classifier.w_out) * above_mid @ classifier.w_mid) * above_in


def _share(labels: torch.Tensor) -> torch.Tensor:
    """Return 1/n at each of a token's n labels, 0 elsewhere."""
    return labels.float() / labels.sum(1, keepdim=True).clamp_min(1)


def _with_rival(goals: Goals, logits: torch.Tensor) -> torch.Tensor:
    """Return T-, with the likeliest label outside T+ where the goals ask for it."""
    rivals = logits.masked_fill(goals.toward, -torch.inf)
    best = torch.zeros_like(goals.away).scatter(1, rivals.argmax(1, keepdim=True), True)
    return goals.away | (best & ~goals.toward & goals.picks_rival.unsqueeze(1))


def _is_satisfied(
    logits: torch.Tensor, goals: Goals, away: torch.Tensor, classifier: Classifier
) -> torch.Tensor:
    """Return whether a token is where its goals want it, `[n_tokens, 1]`.

    Labels that exclude one another count together, for they cannot all be likely; others each.
    """
    p = probabilities(logits, classifier)
    if classifier.is_exclusive:
        wanted = torch.where(goals.toward.any(1), (p * goals.toward).sum(1), 1.0)
        unwanted = (p * away).sum(1)
    else:
        wanted = torch.where(goals.toward, p, 1.0).amin(1)
        unwanted = (p * away).amax(1)
    return ((wanted >= goals.until) & (unwanted <= 1 - goals.until)).unsqueeze(1)


def _with_norm_of(h: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    length = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
    kept = changed * (torch.linalg.vector_norm(h, dim=1, keepdim=True) / length.clamp_min(_TINY))
    return torch.where(length > 0, kept, changed)

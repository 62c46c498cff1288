"""A small classifier of hidden states, drawn from a seed, with doses as a calibration finds."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.classifier import ClassifierArtifact, SafeDose


def toy_classifier(
    ref: ModelRef,
    *,
    id: str = "tone",
    labels: tuple[str, ...] = ("casual", "expert", "concise"),
    layers: tuple[int, ...] = (1,),
    hidden: int = 8,
    seed: int = 0,
    is_exclusive: bool = True,
) -> ClassifierArtifact:
    """Return a classifier of a model's hidden states.

    Its doses are measured toward each label, and away from the first.

    Args:
        ref: the model it reads.
        id: its name.
        labels: in the order of the logits.
        layers: those it reads; requests that name none use all of them.
        hidden: units of each of its two hidden layers; 0 makes it linear.
        seed: of its weights.
        is_exclusive: one label a text, or any number of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(len(layers), *shape, generator=generator) / shape[-1] ** 0.5

    n = len(labels)
    head: dict[str, Any] = {}
    if hidden:
        head = {
            "w_mid": draw(hidden, hidden),
            "b_mid": draw(hidden),
            "w_out": draw(n, hidden),
            "b_out": draw(n),
        }
    toward = [((label,), ()) for label in labels]
    measured = [*toward, ((), labels[:1])]
    return ClassifierArtifact(
        id=id,
        model=ref,
        layers=layers,
        labels=labels,
        is_exclusive=is_exclusive,
        w_in=draw(hidden or n, ref.hidden_size),
        b_in=draw(hidden or n),
        default_layers=layers,
        probe_layer=layers[0],
        doses=tuple(
            SafeDose(target, avoid, picks_rival=False, is_reflection=False, dose=0.2)
            for target, avoid in measured
        ),
        description="drawn from a seed",
        **head,
    )

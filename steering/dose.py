"""Relative dose of a plan: the most that any token of a request can get at a layer."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from trimtab.steering.plan import Guide, Part


def dose_at(
    parts: tuple[Part, ...], layer: int, norms: torch.Tensor, together: set[frozenset[int]]
) -> float:
    """Return the largest relative dose |change| / |h| any token of a request can get at a layer.

    Additive parts are summed as vectors, the steps of guidance, which may point anywhere, as
    lengths. Ablation and reflection do not count: they are bounded by h itself.
    """
    norm = float(norms[layer])
    steps = {
        i: sum(_length(guide) for guide in _guides(part, layer)) for i, part in enumerate(parts)
    }
    adds = {
        i: term.add.double()
        for i, part in enumerate(parts)
        if (term := part.layers.get(layer)) is not None and term.add is not None
    }
    worst = 0.0
    for members in together:
        length = sum(steps[i] for i in members)
        adding = sorted(members & frozenset(adds))
        if adding:
            length += float(torch.stack([adds[i] for i in adding]).sum(0).norm())
        worst = max(worst, length / norm)
    return worst


def _guides(part: Part, layer: int) -> tuple[Guide, ...]:
    term = part.layers.get(layer)
    return () if term is None else term.guides


def _length(guide: Guide) -> float:
    return sum(guide.sizes) if guide.step == "unit" else 0.0


def open_together(parts: tuple[Part, ...]) -> set[frozenset[int]]:
    """Return every set of parts that can act on one token.

    Opposite terms cancel only where both act, so windows are taken at each position where one
    begins or ends, in and out of a thinking span, and each gate as open and as shut.
    """
    windows = [part.window for part in parts]
    cuts = {0, *(n for w in windows for n in (w.first, w.after) if n is not None)}
    positions = np.array([-1, *sorted(cuts)])  # with n_prompt 0, -1 stands for the prompt
    gates = sorted({part.gate.digest for part in parts if part.gate is not None})
    found = set()
    for is_thinking in (False, True):
        thinking = np.full(len(positions), is_thinking)
        inside = np.array([w.select(positions, n_prompt=0, thinking=thinking) for w in windows])
        for column in inside.T if parts else ():
            for states in itertools.product((False, True), repeat=len(gates)):
                is_open = dict(zip(gates, states, strict=True))
                found.add(
                    frozenset(
                        i
                        for i, part in enumerate(parts)
                        if column[i] and (part.gate is None or is_open[part.gate.digest])
                    )
                )
    return found

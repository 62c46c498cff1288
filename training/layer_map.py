"""The map of a direction: effect and damage of one relative dose, layer by layer, scale by scale.

Calibration compares layers at equal damage and draws its curve on the layers it chose. The map says
what lies beside them: what a request does that names other `layers` or another `scale`. Every
number is measured, none is drawn between two others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.training.calibration import Progress

MAP_SCALES = (-1.0, 0.5, 1.0, 2.0, 4.0)
MOST_SINGLES = 10


def mapped_layers(
    candidates: Sequence[tuple[int, ...]], chosen: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Return the layer sets to map: single layers, evenly thinned, and the chosen set.

    Args:
        candidates: the layer sets that calibration compared; runs are left out.
        chosen: the one it took; single or a run, it is there once.

    Returns:
        At most `MOST_SINGLES` + 1 sets, single layers first, ascending.
    """
    singles = sorted({layers for layers in candidates if len(layers) == 1})
    if len(singles) > MOST_SINGLES:
        step = (len(singles) - 1) / (MOST_SINGLES - 1)
        singles = [singles[round(i * step)] for i in range(MOST_SINGLES)]
    return sorted({*singles, chosen}, key=lambda layers: (len(layers), layers))


def layer_map(
    measure: Callable[[Sequence[int], float], tuple[float, float]],
    sets: Sequence[tuple[int, ...]],
    *,
    dose: float,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every layer set at every scale.

    Args:
        measure: returns effect (nats a token) and relative rise of perplexity at some layers under
            a signed relative dose at each of them.
        sets: layer sets, a row each.
        dose: relative dose at scale 1.0, the same for every set, as it is in a stored vector.
        progress: told of cells done and in all.

    Returns:
        `layers`, `scales`, `dose`, and `effect` and `rise`, a row a layer set and a number a scale;
        None where the model answered with infinity or NaN.
    """
    effect: list[list[float | None]] = []
    rise: list[list[float | None]] = []
    n_cells = len(sets) * len(MAP_SCALES)
    for row, layers in enumerate(sets):
        effect.append([])
        rise.append([])
        for column, scale in enumerate(MAP_SCALES):
            shift, damage = measure(layers, scale * dose)
            # An artifact's header holds finite numbers only.
            effect[-1].append(shift if math.isfinite(shift) else None)
            rise[-1].append(damage if math.isfinite(damage) else None)
            if progress is not None:
                done = row * len(MAP_SCALES) + column + 1
                progress("mapping layers and scales", done, n_cells)
    return {
        "layers": [list(layers) for layers in sets],
        "scales": list(MAP_SCALES),
        "dose": dose,
        "effect": effect,
        "rise": rise,
    }

"""A vector's map as a table of text: effect and damage, a row a layer set and a column a scale."""

from __future__ import annotations

from typing import Any

from trimtab.ui.receipt_line import spans
from trimtab.ui.terminal import styled, table

_MOST = 9.99  # a broken model's perplexity rises a thousandfold; how far past this tells nothing
_ROOM = 12  # columns of a cell: "+0.39   +9%"


def map_table(found: dict[str, Any], *, default: list[int]) -> str:
    """Return the table of a calibration record's `map`.

    Args:
        found: the map, see `training/layer_map.py`.
        default: the vector's default layers, marked in the table.

    Raises:
        KeyError, TypeError, ValueError: a map that trimtab did not write.
    """
    rows = []
    for layers, effects, rises in zip(found["layers"], found["effect"], found["rise"], strict=True):
        # int: what stands here is printed as it is, and may be another's.
        at = [int(layer) for layer in layers]
        mark = "*" if at == default else ""
        cells = zip(found["scales"], effects, rises, strict=True)
        name = spans(at).split(" ", 1)[1] + mark
        rows.append((name, *(_cell(effect, rise) for _, effect, rise in cells)))
    header = ("layers", *(f"{scale:+g}".rjust(_ROOM) for scale in found["scales"]))
    head = styled(f"Map on {found['n_pairs']} pairs", "bold")
    what = f", dose {found['dose']:.3f} a layer: effect (nats/token) and damage; * default"
    return f"{head}{what}\n{table(header, rows)}"


def _cell(effect: float | None, rise: float | None) -> str:
    shift = "-" if effect is None else f"{effect:+.2f}"
    return f"{shift} {_damage(rise):>5}".rjust(_ROOM)


def _damage(rise: float | None) -> str:
    if rise is None:
        return "-"
    if rise > _MOST:
        return f">{_MOST:.0%}"
    return f"{round(rise, 2) + 0.0:+.0%}"  # no "-0%"

"""A steering receipt as one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def receipt_line(receipt: dict[str, Any]) -> str:
    """Return what was applied, where and how strongly: `+1 warm at layers 12-14, dose 0.21`.

    Args:
        receipt: of an answer, or of POST /v1/steering/check.
    """
    terms = ", ".join(map(_term, receipt["applied"]))
    doses = receipt["dose"].values()
    if not receipt["layers"]:
        return f"{terms}: scale 0 changes nothing"
    parts = [f"{terms} at {spans(receipt['layers'])}"]
    if doses:
        parts.append(f"dose {_range(doses)} of |h|")
    steered = [choice["steered_tokens"] for choice in receipt.get("choices", [])]
    if steered:
        parts.append(f"{sum(steered)} tokens steered")
    return ", ".join(parts)


def _term(term: dict[str, Any]) -> str:
    if term["kind"] in ("vector", "ablation"):
        return f"{term['scale']:+g} {term['id']}" + (" ablated" * (term["kind"] == "ablation"))
    away = [*term["avoid"], *(["its rival"] if term["avoid_rival"] else [])]
    pieces = [f"toward {' and '.join(term['target'])}"] if term["target"] else []
    if away:
        verb = "with {} turned around" if term["kind"] == "reflection" else "away from {}"
        pieces.append(verb.format(" and ".join(away)))
    scale = "uncalibrated" if term["scale"] is None else f"{term['scale']:g}"
    return f"{scale} {term['id']} {', '.join(pieces)}"


def spans(layers: Sequence[int]) -> str:
    """Return layers in short: `layer 4`, `layers 4-7, 9`."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
    return f"layer{'' if len(layers) == 1 else 's'} {shown}"


def _range(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{high:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"

"""How well a classifier reads at each layer, and how far it may steer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.ui.page.heat_table import Cell, heat_table
from trimtab.ui.page.notice import note
from trimtab.ui.receipt_line import spans

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Scores(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    n: int | None = None
    accuracy: _Number | None = None
    macro_f1: _Number | None = None
    auroc: dict[str, _Number | None] = {}
    ece: _Number | None = None
    log_loss: _Number | None = None


_METRICS = TypeAdapter(Annotated[dict[int, _Scores], Field(max_length=512)])


def scores_html(card: dict[str, Any]) -> str:
    """Return a classifier's measures on held-out texts, a row a layer; ◆ marks what probes read.

    Args:
        card: a classifier's; measures that trimtab did not write are told as that.
    """
    metrics = card.get("metrics")
    if not metrics:
        return note("Not measured: the file says nothing of how well it reads.")
    try:
        found = _METRICS.validate_python(metrics)
    except ValidationError:
        return note("This classifier's measures are not of trimtab's form and cannot be drawn.")
    rows = []
    for layer in sorted(found):
        scores = found[layer]
        areas = [area for area in scores.auroc.values() if area is not None]
        accuracy = scores.accuracy or 0.0
        rows.append(
            (
                str(layer),
                [
                    Cell(
                        "-" if scores.accuracy is None else f"{accuracy:.1%}",
                        max(0.0, 2 * accuracy - 1),
                        f"layer {layer}, {scores.n} states",
                        is_marked=layer == card["probe_layer"],
                    ),
                    _number(scores.macro_f1),
                    _number(sum(areas) / len(areas) if areas else None),
                    _number(scores.ece),
                    _number(scores.log_loss),
                ],
            )
        )
    guides = spans(card["default_layers"])
    return heat_table(
        f"On held-out texts, by layer. ◆ is where probes read; guidance is at {guides}.",
        "layer",
        ["right", "macro F1", "AUROC", "calibration error", "log loss, nats"],
        rows,
    )


def doses_html(card: dict[str, Any]) -> str:
    """Return a classifier's calibrated doses: how far each label set may be steered.

    Args:
        card: a classifier's.
    """
    if not card["doses"]:
        return note("No dose is calibrated: it reads, and steering by it needs a dose of your own.")
    rows = [
        (
            " + ".join(dose["target"]) or "nothing",
            [
                Cell(", ".join([*dose["avoid"], *_rival(dose)]) or "nothing"),
                Cell("reflection" if dose["is_reflection"] else "steps"),
                Cell(f"{dose['dose']:g}"),
            ],
        )
        for dose in card["doses"]
    ]
    return heat_table(
        "Calibrated doses: the furthest at which answers stayed whole.",
        "toward",
        ["away from", "by", "dose, of |h|"],
        rows,
    )


def _rival(dose: dict[str, Any]) -> list[str]:
    return ["likeliest other"] if dose["picks_rival"] else []


def _number(value: float | None) -> Cell:
    return Cell("-" if value is None else f"{value:.3f}")

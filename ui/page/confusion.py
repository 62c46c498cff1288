"""What a classifier takes for what, on hidden states of texts that training held back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.ui.page.heat_table import Cell, heat_table
from trimtab.ui.page.notice import note

_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Counts(_Read):
    tp: _Count
    fp: _Count
    fn: _Count
    tn: _Count


class _Scores(_Read):
    confusion: list[list[_Count]] | None = None
    counts: dict[str, _Counts] | None = None
    auroc: dict[str, _Share | None] = {}


def confusion_html(card: dict[str, Any]) -> str:
    """Return the confusion matrix at the layer that probes read.

    Rows are the truth, columns what was read, each cell the share of its row. Labels that do not
    exclude one another have a row each with what was found and missed instead.

    Args:
        card: a classifier's; measures that trimtab did not write are told as that.
    """
    labels, layer = card["labels"], card["probe_layer"]
    metrics = card.get("metrics") or {}
    found = metrics.get(str(layer)) if isinstance(metrics, dict) else metrics
    if not found:
        return note("Not measured: the file says nothing of how well it reads.")
    try:
        scores = _Scores.model_validate(found)
    except ValidationError:
        return _unknown()
    if scores.confusion is not None:
        if [len(row) for row in scores.confusion] != [len(labels)] * len(labels):
            return _unknown()
        return _matrix(scores.confusion, labels, layer)
    if scores.counts is None or set(scores.counts) != set(labels):
        return _unknown()
    return _each(scores.counts, scores.auroc, labels, layer)


def _matrix(confusion: list[list[int]], labels: list[str], layer: int) -> str:
    rows = []
    for i, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        n = sum(counts)
        cells = []
        for j, count in enumerate(counts):
            share = count / n if n else 0.0
            title = f"{count} of {n} states of {label} read as {labels[j]}"
            way = 1 if i == j else -1
            cells.append(Cell(f"{share:.0%} ({count})" if n else "-", way * share, title))
        rows.append((label, cells))
    return heat_table(
        f"Truth (rows) and what was read at layer {layer} (columns): share of the row, and states. "
        "Blue, the diagonal: right. Orange: taken for another.",
        "truth",
        [f"read as {label}" for label in labels],
        rows,
    )


def _each(
    counts: dict[str, _Counts], auroc: dict[str, float | None], labels: list[str], layer: int
) -> str:
    rows = []
    for label in labels:
        one = counts[label]
        has, lacks = one.tp + one.fn, one.fp + one.tn
        area = auroc.get(label)
        rows.append(
            (
                label,
                [
                    _part(one.tp, has, 1, f"{one.tp} of {has} states with {label} found"),
                    _part(one.fn, has, -1, f"{one.fn} of {has} states with {label} missed"),
                    _part(one.fp, lacks, -1, f"{one.fp} of {lacks} states without {label} taken"),
                    Cell("-" if area is None else f"{area:.2f}"),
                ],
            )
        )
    return heat_table(
        f"Each label at layer {layer}: shares of the states with and without it. Blue: right. "
        "Orange: wrong.",
        "label",
        ["found", "missed", "falsely found", "AUROC"],
        rows,
    )


def _part(count: int, n: int, way: int, title: str) -> Cell:
    share = count / n if n else 0.0
    return Cell(f"{share:.0%} ({count})" if n else "-", way * share, title)


def _unknown() -> str:
    return note(
        "This classifier's measures are not of trimtab's form and cannot be drawn. Measure it with "
        "`trimtab classifiers eval`."
    )

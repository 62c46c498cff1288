"""A vector's effect and damage as heat maps: a row a layer set, a column a scale."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.calibration_record import LayerMap, Record, RecordError, read_record
from trimtab.ui.page.heat_table import Cell, heat_table
from trimtab.ui.page.notice import note
from trimtab.ui.receipt_line import spans

_KNEE_SCALE = 1.0
_MOST_RISE = 9.99  # a broken model's perplexity rises a thousandfold; how far tells nothing
_TOWARD = "Blue: toward the concept."
_KEY = "◆ is what was chosen as scale 1."


def layer_heat_html(calibration: dict[str, Any]) -> str:
    """Return the heat maps of a vector's `calibration`, or of the layers it compared.

    A calibration without a map shows the layer sets that were compared, each at the dose of equal
    damage. One that trimtab did not write is told as that.

    Args:
        calibration: the record in a vector's card.
    """
    try:
        record = read_record(calibration)
    except RecordError as error:
        return note(error.message)
    tables = _candidates(record) if record.map is None else _map(record, record.map)
    return f'<div class="tt-maps">{tables}</div>'


def damage_text(rise: float) -> str:
    """Return a relative rise of perplexity in a few characters."""
    return f">{_MOST_RISE:.0%}" if rise > _MOST_RISE else f"{round(rise, 2) + 0.0:+.0%}"


def damage_share(rise: float, *, accepted: float) -> float:
    """Return how strongly to colour a rise: full at four times what calibration accepts."""
    return -min(1.0, rise / (4 * accepted))


def _map(record: Record, found: LayerMap) -> str:
    most = max((abs(x) for row in found.effect for x in row if x is not None), default=0.0) or 1.0
    columns = [f"{scale:+g}" for scale in found.scales]
    effect, damage = [], []
    for layers, effects, rises in zip(found.layers, found.effect, found.rise, strict=True):
        cells: list[tuple[Cell, Cell]] = []
        for scale, shift, rise in zip(found.scales, effects, rises, strict=True):
            is_knee = layers == record.knee.layers and scale == _KNEE_SCALE
            title = _title(layers, scale, abs(scale) * found.dose, shift, rise, is_knee=is_knee)
            cells.append(
                (
                    _cell(shift, "+.2f", (shift or 0.0) / most, title, is_knee=is_knee),
                    _damage(rise, record, title, is_knee=is_knee),
                )
            )
        effect.append((_layers(layers), [cell for cell, _ in cells]))
        damage.append((_layers(layers), [cell for _, cell in cells]))
    return heat_table(
        f"Effect by layers and scale, nats a token: how far preferred answers gain. {_TOWARD} "
        f"Orange: away. {_KEY}",
        "layers",
        columns,
        effect,
    ) + heat_table(
        "Damage by layers and scale: rise of perplexity on neutral text. The more orange, the "
        f"worse. {_KEY}",
        "layers",
        columns,
        damage,
    )


def _candidates(record: Record) -> str:
    most = max((abs(one.effect) for one in record.candidates), default=0.0) or 1.0
    rows = []
    for one in record.candidates:
        is_knee = one.layers == record.knee.layers
        title = f"{spans(one.layers)}, dose {one.dose:.3f} of |h| at each: {one.effect:+.2f} nats"
        effect = Cell(f"{one.effect:+.2f}", one.effect / most, title, is_marked=is_knee)
        rows.append((_layers(one.layers), [effect, Cell(f"{one.dose:.3f}")]))
    return heat_table(
        "Effect of each layer set at the dose of equal damage, nats a token between steering "
        f"toward and away. {_TOWARD} ◆ is the one that was chosen. Other scales were not mapped.",
        "layers",
        ["effect", "dose, of |h| at each"],
        rows,
    )


def _cell(value: float | None, form: str, share: float, title: str, *, is_knee: bool) -> Cell:
    return Cell("-" if value is None else f"{value:{form}}", share, title, is_marked=is_knee)


def _damage(rise: float | None, record: Record, title: str, *, is_knee: bool) -> Cell:
    if rise is None:
        return Cell("-", 0.0, title, is_marked=is_knee)
    share = damage_share(rise, accepted=record.criteria.max_rise)
    return Cell(damage_text(rise), share, title, is_marked=is_knee)


def _title(
    layers: list[int],
    scale: float,
    dose: float,
    effect: float | None,
    rise: float | None,
    *,
    is_knee: bool,
) -> str:
    shift = "effect not finite" if effect is None else f"effect {effect:+.3f} nats a token"
    damage = "perplexity not finite" if rise is None else f"perplexity {rise:+.1%}"
    chosen = "; chosen as scale 1" if is_knee else ""
    return f"{spans(layers)}, scale {scale:+g} (dose {dose:.3f} of |h|): {shift}, {damage}{chosen}"


def _layers(layers: list[int]) -> str:
    return spans(layers).split(" ", 1)[1]

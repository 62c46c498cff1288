"""A vector's dose-response curve: effect and damage by scale, drawn and as a table."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.calibration_record import Record, RecordError, read_record
from trimtab.ui.page.heat_table import Cell, heat_table
from trimtab.ui.page.layer_heat import damage_share, damage_text
from trimtab.ui.page.notice import note

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 318, 14, 150  # the plot in the picture's units
_WIDTH, _HEIGHT = 368, 190


def curve_html(calibration: dict[str, Any]) -> str:
    """Return the curve on the layers that were chosen, and its numbers.

    Args:
        calibration: the record in a vector's card; one that trimtab did not write is told as that.
    """
    try:
        record = read_record(calibration)
    except RecordError as error:
        return note(error.message)
    return (
        f'<figure class="tt-curve">{_picture(record)}<figcaption>'
        '<span><i class="tt-effect"></i>effect, nats a token (solid, round; left)</span> '
        '<span><i class="tt-damage"></i>damage, rise of perplexity (dashed, square; right)</span>'
        "</figcaption></figure>"
        f"<details><summary>The curve's numbers</summary>{_table(record)}</details>"
    )


def _table(record: Record) -> str:
    accepted = record.criteria.max_rise
    effects = [record.effect(point) for point in record.points]
    most = max(map(abs, effects)) or 1.0
    rows = [
        (
            _signed(point.scale),
            [
                Cell(f"{abs(point.scale) * record.knee.dose:.3f}"),
                Cell(f"{effect:+.2f}", effect / most, is_marked=point.scale == 1.0),
                Cell(damage_text(point.rise), damage_share(point.rise, accepted=accepted)),
            ],
        )
        for point, effect in zip(record.points, effects, strict=True)
    ]
    return heat_table(
        "By scale, on the chosen layers. ◆ is scale 1.",
        "scale",
        ["dose, of |h|", "effect, nats a token", "damage, perplexity"],
        rows,
    )


def _picture(record: Record) -> str:
    scales = [point.scale for point in record.points]
    effects = [record.effect(point) for point in record.points]
    # A broken model's perplexity rises a thousandfold; it must not flatten what comes before.
    most_rise = 4 * record.criteria.max_rise
    rises = [min(point.rise, most_rise) for point in record.points]
    most_effect = max(0.0, *effects) or max(map(abs, effects)) or 1.0
    # One height for both zeros, so that above and below mean the same for both.
    below = max(_below(min(effects), most_effect), _below(min(rises), most_rise))
    zero = _BOTTOM - below * (_BOTTOM - _TOP)
    low, high = scales[0], scales[-1]

    def x(scale: float) -> float:
        share = (scale - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(share: float) -> float:
        return zero - share * (zero - _TOP)

    effect_at = [(x(s), y(e / most_effect)) for s, e in zip(scales, effects, strict=True)]
    damage_at = [(x(s), y(rise / most_rise)) for s, rise in zip(scales, rises, strict=True)]
    dots = "".join(
        f'<circle class="tt-effect" cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>scale {s:+g}: '
        f"effect {e:+.2f} nats a token</title></circle>"
        for (px, py), s, e in zip(effect_at, scales, effects, strict=True)
    ) + "".join(
        f'<rect class="tt-damage" x="{px - 3:.1f}" y="{py - 3:.1f}" width="6" height="6">'
        f"<title>scale {p.scale:+g}: perplexity {damage_text(p.rise)}</title></rect>"
        for (px, py), p in zip(damage_at, record.points, strict=True)
    )
    named = {low, 0.0, 1.0, 2.0, high}
    ticks = "".join(_label(x(s), _BOTTOM + 16, _signed(s)) for s in scales if s in named)
    over = "≥" if any(point.rise > most_rise for point in record.points) else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Effect and damage by scale; the numbers are in the table below">'
        f'<line class="tt-axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>'
        f"{_at_knee(x(1.0)) if low <= 1.0 <= high else ''}"
        f"{_line(effect_at, 'tt-effect')}{_line(damage_at, 'tt-damage')}{dots}{ticks}"
        f"{_label(_LEFT - 6, _TOP + 4, f'{most_effect:+.2f}', 'end')}"
        f"{_label(_LEFT - 6, zero + 4, '0', 'end')}"
        f"{_label(_RIGHT + 6, _TOP + 4, f'{over}{most_rise:+.0%}', 'start')}"
        f"{_label((_LEFT + _RIGHT) / 2, _HEIGHT - 6, 'scale')}</svg>"
    )


def _at_knee(x: float) -> str:
    return (
        f'<line class="tt-at-knee" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>'
        f"{_label(x + 3, _TOP - 4, '◆ scale 1', 'start')}"
    )


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _signed(scale: float) -> str:
    return f"{scale:+g}" if scale else "0"


def _line(places: list[tuple[float, float]], name: str) -> str:
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    return f'<polyline class="{name}" points="{joined}"/>'


def _below(least: float, most: float) -> float:
    """Return the share of the height that lies below zero."""
    return max(0.0, -least) / (most + max(0.0, -least))

"""A vector's calibration as a chart of text: effect and damage at each scale, the knee marked."""

from __future__ import annotations

from typing import Any

from trimtab.ui.receipt_line import spans
from trimtab.ui.terminal import bar, styled, width


def curve_chart(calibration: dict[str, Any]) -> str:
    """Return the chart of an artifact's `calibration` record.

    Effect is the change of the calibration pairs' margin against scale 0, in nats a token; damage
    the relative rise of perplexity on neutral text. Both bars are drawn to their largest value.
    """
    points = sorted(calibration["curve"], key=lambda point: point["scale"])
    knee = calibration["knee"]
    zero = next((p["margin"] for p in points if p["scale"] == 0), 0.0)
    effects = [p["margin"] - zero for p in points]
    room = max(8, (width() - 44) // 3)
    most_effect = max(map(abs, effects)) or 1.0
    # A broken model's perplexity rises a thousandfold; its bar must not flatten all others.
    cap = 4 * calibration["criteria"]["max_rise"]
    lines = [
        styled(f"Calibration on {calibration['n_pairs']} pairs", "bold")
        + f", {spans(knee['layers'])}, chosen from {len(calibration['candidates'])} layer sets",
        f"{'scale':>6} {'dose':>5}  {'effect (nats/token)':<{2 * room + 10}}damage (perplexity)",
    ]
    for point, effect in zip(points, effects, strict=True):
        dose = abs(point["scale"]) * knee["dose"]
        drawn = bar(abs(effect) / most_effect, room)
        left, right = (drawn, "") if effect < 0 else ("", drawn)
        rise = point["rise"]
        over = ">" if rise > cap else ""
        line = (
            f"{point['scale']:>+6g} {dose:>5.2f}  {effect:>+6.2f} {left:>{room}}|{right:<{room}} "
            f"{rise:>+6.0%} {bar(min(max(rise, 0.0), cap) / cap, room)}{over}"
        )
        if point["scale"] == 1.0:
            line = styled(f"{line.rstrip()}  <- knee: scale 1", "green")
        lines.append(line.rstrip())
    if not knee["is_clean"]:
        lines.append(styled(f"Not clean: {knee['problem']}.", "yellow"))
    return "\n".join(lines)

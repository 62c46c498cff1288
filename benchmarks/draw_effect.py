"""Draw what `vector_effect.py --json FILE` measured: effect and damage over scale.

    python benchmarks/draw_effect.py effect.json docs/effect.svg

Two panels with one line a concept: the shift of the held pairs' mean margin against scale 0, and
the rise of perplexity. The shaded band is the calibrated range, scale -1 to 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, PANEL = 860, 340, 60, 46, 330
# Okabe and Ito's palette, told apart by colour-blind readers too; dashes tell the rest.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{text}</text>'


def _panel(left: float, title: str, lines: dict[str, dict[float, float]], unit: str) -> list[str]:
    height = HEIGHT - TOP - 60
    values = [v for line in lines.values() for v in line.values()]
    low, high = min(0.0, *values), max(values)

    def x(scale: float) -> float:
        return left + (scale + 1.0) / 5.0 * PANEL

    def y(value: float) -> float:
        return TOP + height * (1.0 - (value - low) / (high - low))

    parts = [
        f'<rect x="{x(-1):.1f}" y="{TOP}" width="{x(1) - x(-1):.1f}" height="{height}" '
        'fill="#eef3f7"/>',
        _text(left + PANEL / 2, TOP - 14, title, size=14),
        f'<line x1="{left}" y1="{y(0):.1f}" x2="{left + PANEL}" y2="{y(0):.1f}" stroke="#999"/>',
    ]
    parts += [_text(x(s), TOP + height + 18, f"{s:g}") for s in (-1.0, 0.0, 1.0, 2.0, 4.0)]
    parts.append(_text(left + PANEL / 2, TOP + height + 38, "scale"))
    for value in (low, 0.0, high):
        shown = f"{value:+.0%}" if unit == "%" else f"{value:+.2f}"
        parts.append(_text(left - 6, y(value) + 4, shown, anchor="end", size=11))
    for i, line in enumerate(lines.values()):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in sorted(line.items()))
        dash = "" if i < 4 else ' stroke-dasharray="6 3"'
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" '
            f'stroke-width="2"{dash}/>'
        )
    return parts


def draw(rows: list[dict[str, Any]]) -> str:
    """Return the picture as SVG."""
    margins, rises = {}, {}
    for row in rows:
        margin = {float(k): v for k, v in row["margin"].items()}
        margins[row["concept"]] = {s: margin[s] - margin[0.0] for s in SCALES}
        rises[row["concept"]] = {float(k): v for k, v in row["rise"].items() if float(k) <= 2.0}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_panel(LEFT, "effect: margin shift, nats a token", margins, ""),
        *_panel(LEFT + PANEL + 90, "damage: perplexity, up to scale 2", rises, "%"),
    ]
    step = WIDTH / (len(rows) + 1)
    for i, row in enumerate(rows):
        at = step * (i + 1)
        dash = "" if i < 4 else ' stroke-dasharray="6 3"'
        parts.append(
            f'<line x1="{at - 42:.0f}" y1="{HEIGHT - 10}" x2="{at - 22:.0f}" y2="{HEIGHT - 10}" '
            f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="3"{dash}/>'
        )
        parts.append(_text(at - 18, HEIGHT - 6, row["concept"], anchor="start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Read the measurements, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.measured.read_text(encoding="utf-8"))
    args.picture.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

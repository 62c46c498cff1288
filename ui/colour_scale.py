"""Red for what speaks for an answer, blue for what speaks against it, over any background.

Red and blue differ for every kind of colour-blindness, and the colour's strength is the score's
size, none at zero.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

RGB = tuple[int, int, int]

# Text is black on light paper and white on dark; at full strength each has a contrast of at
# least 4.5 to 1 (WCAG AA), which a test computes.
PLUS = {"light": (239, 68, 60), "dark": (200, 40, 40)}
MINUS = {"light": (59, 130, 246), "dark": (37, 99, 235)}
PAPER = {"light": (255, 255, 255), "dark": (16, 18, 24)}
INK = {"light": (0, 0, 0), "dark": (255, 255, 255)}
# A weaker tint cannot be told from the paper.
_LEAST = 0.04
_COLOURLESS = ("5;16", "5;231")  # what a weak tint comes to where there are few colours
_CUBE = (0, 95, 135, 175, 215, 255)


def tint(share: float, *, paper: str = "light") -> RGB:
    """Return the colour of a share of the scale, laid over a paper.

    Args:
        share: -1 to 1; red above zero, blue below.
        paper: `light` or `dark`.
    """
    colour = PLUS[paper] if share > 0 else MINUS[paper]
    strength = min(abs(share), 1.0)
    red, green, blue = (
        round(below + (above - below) * strength)
        for above, below in zip(colour, PAPER[paper], strict=True)
    )
    return red, green, blue


def painted(text: str, share: float) -> str:
    """Return a text on a share's colour, in a terminal's escape codes; bare near zero."""
    paper = terminal_paper(os.environ)
    colour = _coded(tint(share, paper=paper), os.environ)
    if abs(share) < _LEAST or colour in _COLOURLESS:
        return text
    codes = f"38;{_coded(INK[paper], os.environ)};48;{colour}"
    # Line ends stay bare: some terminals paint the rest of the line otherwise.
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else line for line in text.split("\n"))


def terminal_paper(environment: Mapping[str, str]) -> str:
    """Return `light` or `dark`; what does not say so (COLORFGBG) is taken for dark."""
    background = environment.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", "15") else "dark"


def _coded(colour: RGB, environment: Mapping[str, str]) -> str:
    if environment.get("COLORTERM", "") in ("truecolor", "24bit"):
        return "2;" + ";".join(map(str, colour))
    return f"5;{nearest_of_256(colour)}"


def nearest_of_256(colour: RGB) -> int:
    """Return the nearest colour of a 256-colour terminal's cube, 16 to 231.

    Its greys are left out: a weak tint would lose its hue, and so its sign.
    """
    red, green, blue = (min(range(6), key=lambda i: abs(_CUBE[i] - part)) for part in colour)
    return 16 + 36 * red + 6 * green + blue

"""An attribution in the terminal: the prompt with coloured words, or a table of its strongest."""

from __future__ import annotations

import sys
from itertools import groupby

from trimtab.ui.attribution_pieces import Piece
from trimtab.ui.attribution_report import Report
from trimtab.ui.colour_scale import painted
from trimtab.ui.terminal import bar, can_show, has_colour, styled, width, wrapped
from trimtab.ui.visible_text import visible

MOST_ROWS = 20
_CELLS = 9


def attribution_text(report: Report) -> str:
    """Return the report for stdout: coloured text where it takes colour, a table elsewhere."""
    is_coloured = has_colour(sys.stdout)
    scores = f"{coloured(report)}\n\n{legend(report)}" if is_coloured else strongest(report)
    return f"{answers(report)}\n\n{scores}\n\n{facts(report)}"


def answers(report: Report) -> str:
    """Return each answer with its log-probability."""
    lines = []
    for name, text in report.answers.items():
        tokens = report.tokens_of(name)
        total = sum(token["logprob"] for token in tokens)
        counted = f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
        lines.append(f"{styled(report.heading(name) + ':', 'bold')} {_text(text)}")
        lines.append(styled(f"  log P {total:.3f} nats over {counted}", "dim"))
    return "\n".join(lines)


def coloured(report: Report) -> str:
    """Return the whole prompt, each word on its score's colour, the template dimmed."""
    shown = []
    for is_frame, pieces in groupby(report.pieces, key=lambda piece: piece.score is None):
        if is_frame:
            shown.append(_dimmed(_text("".join(piece.text for piece in pieces))))
        else:
            shown += [painted(_text(piece.text), report.share(piece)) for piece in pieces]
    return "".join(shown).rstrip("\n")


def legend(report: Report) -> str:
    """Return the scale: both ends, and the colours between."""
    half = range(1, _CELLS + 1)
    left = "".join(painted("  ", -i / _CELLS) for i in reversed(half))
    right = "".join(painted("  ", i / _CELLS) for i in half)
    end = f"{report.end:.3f}"
    return (
        f"-{end} {left} 0 {right} +{end} {report.unit}\n"
        "Red speaks for the answer, blue against it. Dimmed text is the template, which stays."
    )


def strongest(report: Report) -> str:
    """Return the strongest words as a table with signed bars."""
    rows = report.scored[:MOST_ROWS]
    room = max(4, (width() - 40) // 2)
    where = max([5, *(len(piece.where) for piece in rows)])
    lines = [f"{'token':>{where}} {'score':>8}  {'against':>{room}}|{'for':<{room}}  text"]
    for piece in rows:
        share = report.share(piece)
        drawn = bar(abs(share), room)
        left, right = (drawn, "") if share < 0 else ("", drawn)
        score = f"{piece.score:+.3f}"
        lines.append(
            f"{piece.where:>{where}} {score:>8}  {left:>{room}}|{right:<{room}}  {quoted(piece)}"
        )
    lines[0] = styled(lines[0], "bold")
    rest = report.scored[MOST_ROWS:]
    if rest:
        lines.append(f"and {len(rest)} more, none over {abs(rest[0].score or 0.0):.3f}")
    lines.append(f"A full bar is {report.end:.3f} {report.unit}.")
    return "\n".join(lines)


def facts(report: Report) -> str:
    """Return in words what the scores mean, how far they go and what they took."""
    lines = [wrapped(report.values), wrapped(report.completeness)]
    if report.doubt:
        lines.append(styled(wrapped(report.doubt), "yellow"))
    if report.faithfulness:
        lines.append(wrapped(report.faithfulness))
    if report.steering:
        lines.append(wrapped(f"Steered: {report.steering}."))
    lines.append(wrapped(report.work))
    return "\n".join(lines)


def quoted(piece: Piece) -> str:
    """Return a piece's text in quotes, on one line, with nothing a terminal would obey."""
    return repr(piece.text) if can_show(piece.text) else ascii(piece.text)


def _text(text: str) -> str:
    shown = visible(text, mark="↵" if can_show("↵") else "\\n")
    return shown if can_show(shown) else shown.encode("ascii", "backslashreplace").decode()


def _dimmed(text: str) -> str:
    return "\n".join(styled(line, "dim") if line else line for line in text.split("\n"))

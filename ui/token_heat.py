"""Scores as HTML: the prompt on its colours, their legend, and the figures behind it.

All text in it is a stranger's, and is escaped. It stands without script and without inline styles,
so that a page may forbid both; what shows it brings `style()` and the colours `--tt-plus`,
`--tt-minus`, `--tt-soft`, `--tt-line` and `--tt-on-tint`, the text's on a tint.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from trimtab.ui.attribution_pieces import Piece
from trimtab.ui.attribution_report import Report
from trimtab.ui.attribution_scores import Scores
from trimtab.ui.visible_text import visible

FOR_THE_ANSWER = "Red speaks for the answer, blue against it"


def prompt_html(scores: Scores) -> str:
    """Return the prompt, each piece on its score's colour, with its figures under the pointer."""
    spans = "".join(_span(scores, piece) for piece in scores.pieces)
    return f'<div class="tt-heat" dir="auto" translate="no">{spans}</div>'


def _span(scores: Scores, piece: Piece) -> str:
    share = scores.share(piece)
    ids = ", ".join(map(str, piece.ids))
    score = "" if piece.score is None else f", {scores.account(piece)}"
    title = f"#{piece.where} {piece.text!r}, id {ids}, {piece.kind}{score}"
    sign = "tt-p" if share > 0 else "tt-n"
    strength = f"{sign} tt-a{round(abs(share) * 100)}"
    look = f"tt-frame tt-{piece.kind}" if piece.score is None else strength
    return f'<span class="{look}" title="{escape(title)}">{_text(piece.text)}</span>'


def legend_html(scores: Scores, *, meaning: str = FOR_THE_ANSWER) -> str:
    """Return the scale with its ends, and what the colours mean in words."""
    end = f"{scores.end:.3f}"
    return (
        f'<p class="tt-scale"><span class="tt-ends">−{end}<span class="tt-ramp" role="img" '
        f'aria-label="blue below zero, red above"></span>+{end} {escape(scores.unit)}.</span> '
        f"{escape(meaning)}; grey is the template, which stays. Hover over a word for its "
        "score.</p>"
    )


def log_p(report: Report, answer: str) -> str:
    """Return an answer's log-probability in words."""
    total = sum(token["logprob"] for token in report.tokens_of(answer))
    return f"log P {total:.3f} nats"


def answer_html(report: Report, answer: str) -> str:
    """Return an answer's text."""
    return f'<p class="tt-whole" dir="auto" translate="no">{_text(report.answers[answer])}</p>'


def chips_html(report: Report, answer: str) -> str:
    """Return an answer's tokens, each over its log-probability."""
    chips = "".join(
        f'<span class="tt-token" title="{escape(_title_of(token))}">'
        f"<span>{_text(token['token'])}</span><b>{token['logprob']:.2f}</b></span>"
        for token in report.tokens_of(answer)
    )
    return f'<p class="tt-tokens" translate="no">{chips}</p>'


def _title_of(token: Mapping[str, Any]) -> str:
    return f"{token['token']!r}, id {token['token_id']}, log P {token['logprob']:.6f} nats"


def facts_html(*lines: str | None) -> str:
    """Return sentences as paragraphs; None is left out."""
    return "\n".join(f"<p>{_text(line)}</p>" for line in lines if line)


def settings_html(report: Report) -> str:
    """Return how it was made, as a table."""
    result = report.result
    what = "99th percentile of the scores' sizes" if report.scale is None else "same for every map"
    settings = {
        "model": result["model"],
        "precision": result["dtype"],
        "method": result["method"],
        **result["params"],
        "length normalized": result["objective"]["length_normalized"],
        "steering": report.steering or "none",
        "scale's end": f"{report.end:.6f} {report.unit}, the {what}",
    }
    rows = "".join(
        f'<tr><th scope="row">{_text(str(name))}</th><td>{_text(str(value))}</td></tr>\n'
        for name, value in settings.items()
    )
    return f"<table>\n{rows}</table>"


def tokens_html(**columns: Scores) -> str:
    """Return every token of the prompt with its scores, as a table.

    Args:
        columns: scores of one prompt, by the heading of their column.
    """
    every = list(columns.values())
    rows = "".join(
        f'<tr><td>{row[0]["index"]}</td><th scope="row"><code>{escape(repr(row[0]["token"]))}'
        f"</code></th><td>{row[0]['token_id']}</td><td>{escape(row[0]['kind'])}</td>"
        + "".join(f"<td>{_figure(token['score'])}</td>" for token in row)
        + "</tr>\n"
        for row in zip(*(scores.tokens for scores in every), strict=True)
    )
    headings = ["#", "token", "id", "kind", *(f"{name}, {every[0].unit}" for name in columns)]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    return f'<table class="tt-figures">\n<tr>{head}</tr>\n{rows}</table>'


def _figure(score: float | None) -> str:
    return "" if score is None else f"{score:+.6f}"


def _text(text: str) -> str:
    return escape(visible(text))


def style() -> str:
    """Return the style sheet. Strengths are classes: a policy without inline styles is stricter."""
    return _RULES + "".join(f".tt-a{i}{{--tt-a:{i}%}}" for i in range(101))


# A token has neither padding nor border, which would break the joined letters of Arabic; with
# `plaintext` each line takes its own direction. A special token is a sign, not a part of the line:
# its brackets do not turn round.
_RULES = """
.tt-heat,.tt-whole{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;
line-height:1.9;margin:.3rem 0}
.tt-frame{color:var(--tt-soft)}
.tt-special{unicode-bidi:isolate;direction:ltr}
.tt-p,.tt-n{color:var(--tt-on-tint)}
.tt-p{background:color-mix(in srgb,var(--tt-plus) var(--tt-a),transparent)}
.tt-n{background:color-mix(in srgb,var(--tt-minus) var(--tt-a),transparent)}
.tt-token{display:inline-block;margin:0 .5rem .3rem 0;text-align:center;white-space:pre-wrap;
vertical-align:bottom;line-height:1.3}
.tt-token b{display:block;font-weight:normal;font-size:.75rem;color:var(--tt-soft)}
.tt-ends{white-space:nowrap}
.tt-ramp{display:inline-block;width:12rem;max-width:25vw;height:.8em;margin:0 .5rem;
border:1px solid var(--tt-line);
background:linear-gradient(to right,var(--tt-minus),transparent,var(--tt-plus))}
"""

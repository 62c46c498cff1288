"""An attribution as a page of HTML that needs nothing from elsewhere and runs no script.

All text in it is a stranger's. It is escaped, and should that ever fail the page's policy lets
nothing run and nothing load: the one style sheet is allowed by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import Any

from trimtab.ui.attribution_pieces import Piece
from trimtab.ui.attribution_report import Report
from trimtab.ui.colour_scale import MINUS, PAPER, PLUS
from trimtab.ui.visible_text import visible


def attribution_page(report: Report) -> str:
    """Return the whole page."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"Attribution: {report.result['model']}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{_answers(report)}
<h2>Prompt</h2>
<div class="prompt" dir="auto" translate="no">{_prompt(report)}</div>
{_legend(report)}
{_facts(report)}
<h2>Settings</h2>
{_settings(report)}
<details><summary>All tokens</summary>
{_tokens(report)}
</details>
</body>
</html>
"""


def _prompt(report: Report) -> str:
    return "".join(_span(piece, report.share(piece)) for piece in report.pieces)


def _span(piece: Piece, share: float) -> str:
    ids = ", ".join(map(str, piece.ids))
    score = "" if piece.score is None else f", {piece.score:+.6f}"
    title = f"#{piece.where} {piece.text!r}, id {ids}, {piece.kind}{score}"
    sign = "p" if share > 0 else "n"
    look = f"frame {piece.kind}" if piece.score is None else f"{sign} a{round(abs(share) * 100)}"
    return f'<span class="{look}" title="{escape(title)}">{_text(piece.text)}</span>'


def _answers(report: Report) -> str:
    parts = []
    for name, text in report.answers.items():
        tokens = report.tokens_of(name)
        total = sum(token["logprob"] for token in tokens)
        chips = "".join(
            f'<span class="chip" title="{escape(_title_of(token))}">'
            f"<span>{_text(token['token'])}</span><b>{token['logprob']:.2f}</b></span>"
            for token in tokens
        )
        parts.append(
            f"<h2>{escape(report.heading(name))}: log P {total:.3f} nats</h2>\n"
            f'<p class="answer" dir="auto" translate="no">{_text(text)}</p>\n'
            f'<p class="chips" translate="no">{chips}</p>'
        )
    return "\n".join(parts)


def _title_of(token: Any) -> str:
    return f"{token['token']!r}, id {token['token_id']}, log P {token['logprob']:.6f} nats"


def _legend(report: Report) -> str:
    end = f"{report.end:.3f}"
    return (
        f'<p class="legend">−{end}<span class="ramp" role="img" '
        f'aria-label="blue below zero, red above"></span>+{end} {report.unit}. '
        "Red speaks for the answer, blue against it; grey is the template, which stays. Hover over "
        "a word for its score.</p>"
    )


def _facts(report: Report) -> str:
    lines = [
        report.values,
        report.completeness,
        report.doubt,
        report.faithfulness,
        report.work,
    ]
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines if line)


def _settings(report: Report) -> str:
    result = report.result
    settings = {
        "model": result["model"],
        "precision": result["dtype"],
        "method": result["method"],
        **result["params"],
        "length normalized": result["objective"]["length_normalized"],
        "steering": report.steering or "none",
        "scale's end": f"{report.end:.6f} {report.unit}, the 99th percentile of the scores' sizes",
    }
    rows = "".join(
        f"<tr><th>{_text(str(name))}</th><td>{_text(str(value))}</td></tr>\n"
        for name, value in settings.items()
    )
    return f"<table>\n{rows}</table>"


def _tokens(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{token['index']}</td><td><code>{escape(repr(token['token']))}</code></td>"
        f"<td>{token['token_id']}</td><td>{escape(token['kind'])}</td>"
        f"<td>{'' if token['score'] is None else format(token['score'], '+.6f')}</td></tr>\n"
        for token in report.result["input"]
    )
    head = (
        f"<tr><th>#</th><th>token</th><th>id</th><th>kind</th><th>score, {report.unit}</th></tr>\n"
    )
    return f'<table class="tokens">\n{head}{rows}</table>'


def _text(text: str) -> str:
    return escape(visible(text))


def _style() -> str:
    """Return the style sheet. Strengths are classes: a policy without inline styles is stricter."""
    steps = "".join(f".a{i}{{--a:{i / 100:.2f}}}" for i in range(101))
    return _RULES % (_colours("light"), _colours("dark")) + steps


def _colours(paper: str) -> str:
    named = {"plus": PLUS[paper], "minus": MINUS[paper], "paper": PAPER[paper]}
    return "".join(f"--{name}:{r} {g} {b};" for name, (r, g, b) in named.items())


# A token has neither padding nor border, which would break the joined letters of Arabic; with
# `plaintext` each line takes its own direction. A special token is a sign, not a part of the line:
# its brackets do not turn round.
_RULES = """
:root{color-scheme:light dark;--ink:#000;--grey:#5f6673;--line:#d4d7dd;%s}
@media(prefers-color-scheme:dark){:root{--ink:#fff;--grey:#9ca3af;--line:#3a3f4a;%s}}
body{background:rgb(var(--paper));color:var(--ink);max-width:60rem;margin:2rem auto;padding:0 1rem;
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1rem;margin:1.5rem 0 .3rem}
.prompt,.answer{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;
line-height:1.9;margin:.3rem 0}
.frame{color:var(--grey)}
.special{unicode-bidi:isolate;direction:ltr}
.p{background:rgb(var(--plus)/var(--a))}.n{background:rgb(var(--minus)/var(--a))}
.chip{display:inline-block;margin:0 .5rem .3rem 0;text-align:center;white-space:pre-wrap;
vertical-align:bottom;line-height:1.3}
.chip b{display:block;font-weight:normal;font-size:.75rem;color:var(--grey)}
.ramp{display:inline-block;width:12rem;height:.8em;margin:0 .5rem;border:1px solid var(--line);
background:linear-gradient(to right,rgb(var(--minus)),transparent,rgb(var(--plus)))}
table{border-collapse:collapse}th,td{text-align:left;padding:.15rem .8rem .15rem 0;
border-bottom:1px solid var(--line);font-size:.9rem;vertical-align:top}
th{font-weight:normal;color:var(--grey)}
"""

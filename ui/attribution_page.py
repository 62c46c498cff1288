"""An attribution as a page of HTML that needs nothing from elsewhere and runs no script.

All text in it is a stranger's. It is escaped, and should that ever fail the page's policy lets
nothing run and nothing load: the one style sheet is allowed by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from trimtab.ui import token_heat
from trimtab.ui.attribution_report import Report
from trimtab.ui.colour_scale import INK, MINUS, PAPER, PLUS, RGB
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
{token_heat.prompt_html(report)}
{token_heat.legend_html(report)}
{_facts(report)}
<h2>Settings</h2>
{token_heat.settings_html(report)}
<details><summary>All tokens</summary>
{token_heat.tokens_html(score=report)}
</details>
</body>
</html>
"""


def _answers(report: Report) -> str:
    return "\n".join(
        f"<h2>{escape(report.heading(name))}: {token_heat.log_p(report, name)}</h2>\n"
        f"{token_heat.answer_html(report, name)}\n{token_heat.chips_html(report, name)}"
        for name in report.answers
    )


def _facts(report: Report) -> str:
    return token_heat.facts_html(
        report.values, report.completeness, report.doubt, report.faithfulness, report.work
    )


def _text(text: str) -> str:
    return escape(visible(text))


def _style() -> str:
    return _RULES % (_colours("light"), _colours("dark")) + token_heat.style()


def _colours(paper: str) -> str:
    named: dict[str, RGB] = {
        "plus": PLUS[paper],
        "minus": MINUS[paper],
        "paper": PAPER[paper],
        "on-tint": INK[paper],
    }
    return "".join(f"--tt-{name}:rgb({r} {g} {b});" for name, (r, g, b) in named.items())


_RULES = """
:root{color-scheme:light dark;--tt-soft:#5f6673;--tt-line:#d4d7dd;%s}
@media(prefers-color-scheme:dark){:root{--tt-soft:#9ca3af;--tt-line:#3a3f4a;%s}}
body{background:var(--tt-paper);color:var(--tt-on-tint);max-width:60rem;margin:2rem auto;
padding:0 1rem;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1rem;margin:1.5rem 0 .3rem}
table{border-collapse:collapse}th,td{text-align:left;padding:.15rem .8rem .15rem 0;
border-bottom:1px solid var(--tt-line);font-size:.9rem;vertical-align:top}
th{font-weight:normal;color:var(--tt-soft)}
"""

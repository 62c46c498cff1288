"""An explanation as HTML: how far it is, then its heat maps. All strangers' text is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from trimtab.ui import token_heat
from trimtab.ui.attribution_difference import Difference
from trimtab.ui.attribution_report import Report
from trimtab.ui.attribution_scores import Scores
from trimtab.ui.page.plain_text import plain
from trimtab.ui.page.progress_bar import progress_bar
from trimtab.ui.page.why_run import Explanation

_MOST_ROWS = 8
_CHANGE = (
    "Red: under the steering the word speaks more for the answer; blue: less, or more against it"
)
_SAID = {True: "under the steering", False: "without steering"}


def progress_html(explanation: Explanation) -> str:
    """Return how far it is, as a bar with its figures; empty once nothing is under way."""
    if not explanation.n_left or explanation.error or explanation.is_cancelled:
        return ""
    sides, n_done = explanation.question.sides, len(explanation.results)
    which = f"{n_done + 1} of {len(sides)}, {_SAID[sides[n_done]]}: " if len(sides) > 1 else ""
    found = explanation.progress
    told = which + _how_far(found)
    return progress_bar(told, done=found.get("done", 0), total=found.get("total", 0))


def _how_far(progress: dict[str, Any]) -> str:
    before = progress.get("position", 0)
    if before:
        return f"waiting; {before} before it in the server's queue"
    if not progress.get("total"):
        return "asking the server"
    told = f"{progress['done']} of {progress['total']} rows read"
    left = progress.get("eta_s")
    if left is None:
        return told
    return f"{told}, about {left / 60:.0f} min left" if left > 90 else f"{told}, {left:.0f} s left"


def result_html(explanation: Explanation) -> str:
    """Return the answers, a heat map of each side that is done, and their difference."""
    question = explanation.question
    reports = [Report(result, question.answers) for result in explanation.results]
    if not reports:
        return ""
    difference = None
    if len(reports) == 2:
        difference = Difference(steered=reports[0], unsteered=reports[1]).on_one_scale()
        reports = [difference.steered, difference.unsteered]
    has_two = len(question.sides) > 1
    maps = "".join(
        _map(report, _SAID[is_steered].capitalize() if has_two else "The prompt")
        for report, is_steered in zip(reports, question.sides, strict=False)
    )
    maps = f'<div class="tt-sides">{maps}</div>' if has_two else maps
    columns: dict[str, Scores] = {"score": reports[0]}
    if difference is not None:
        columns = {"steered": reports[0], "unsteered": reports[1], "difference": difference}
    return (
        f'<div class="tt-why">{_answers(explanation, reports)}{maps}'
        f"{'' if difference is None else _difference(difference)}"
        f"{_details('Every token of the prompt', token_heat.tokens_html(**columns))}"
        f"{_details('Settings', token_heat.settings_html(reports[0]))}</div>"
    )


def _answers(explanation: Explanation, reports: list[Report]) -> str:
    question = explanation.question
    has_two = len(question.sides) > 1
    parts = []
    for answer, name in question.names.items():
        told = [
            token_heat.log_p(report, answer) + (f" {_SAID[is_steered]}" if has_two else "")
            for report, is_steered in zip(reports, question.sides, strict=False)
        ]
        chips = "".join(
            (f'<p class="tt-hint">{_SAID[is_steered].capitalize()}</p>' if has_two else "")
            + token_heat.chips_html(report, answer)
            for report, is_steered in zip(reports, question.sides, strict=False)
        )
        parts.append(
            f'<section class="tt-sheet"><h2>{plain(name)}: {", ".join(told)}</h2>'
            f"{token_heat.answer_html(reports[0], answer)}"
            f"{_details('log P of each of its tokens', chips)}</section>"
        )
    return "".join(parts)


def _map(report: Report, heading: str) -> str:
    steered = None if report.steering is None else f"Steered: {report.steering}."
    completeness = token_heat.facts_html(report.values, report.completeness)
    facts = token_heat.facts_html(report.faithfulness, steered, report.work)
    return (
        f'<section class="tt-sheet"><h2>{plain(heading)}</h2>{token_heat.prompt_html(report)}'
        f'{token_heat.legend_html(report)}<div class="tt-told">{completeness}</div>'
        f"{_doubt(report)}"
        f"{_strongest('Strongest words', score=report)}"
        f'<div class="tt-told">{facts}</div></section>'
    )


def _difference(difference: Difference) -> str:
    words = _strongest(
        "Words that changed most",
        difference=difference,
        steered=difference.steered,
        unsteered=difference.unsteered,
    )
    facts = token_heat.facts_html(difference.summary, _SCALE)
    return (
        '<section class="tt-sheet"><h2>Difference: steered minus unsteered</h2>'
        f"{token_heat.prompt_html(difference)}{token_heat.legend_html(difference, meaning=_CHANGE)}"
        f'{words}<div class="tt-told">{facts}</div></section>'
    )


_SCALE = "All three maps have one scale, so that their colours can be compared."


def _doubt(report: Report) -> str:
    if report.warning is None:
        return ""
    told, remedy = report.warning
    options = ", ".join(f"{name}={value}" for name, value in remedy.items())
    more = f" Try {options} among the method's options." if remedy else ""
    return f'<p class="tt-warning" role="status">{plain(told + more)}</p>'


def _strongest(caption: str, **columns: Scores) -> str:
    """Return a table of the pieces that weigh most in the first column."""
    first = next(iter(columns.values()))
    headings = "".join(f'<th scope="col">{name}</th>' for name in ("word", *columns))
    every = [{piece.indexes: piece for piece in scores.pieces} for scores in columns.values()]
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(repr(piece.text))}</code></th>'
        + "".join(f"<td>{pieces[piece.indexes].score:+.3f}</td>" for pieces in every)
        + "</tr>"
        for piece in first.scored[:_MOST_ROWS]
    )
    return (
        f'<div class="tt-wide"><table><caption>{caption}, {plain(first.unit)}</caption>'
        f"<tr>{headings}</tr>{rows}</table></div>"
    )


def _details(summary: str, inside: str) -> str:
    return (
        f'<details class="tt-details"><summary>{summary}</summary>'
        f'<div class="tt-wide">{inside}</div></details>'
    )

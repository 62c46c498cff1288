"""How far a build is and what it came to, as HTML."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.build_watch import is_under_way
from trimtab.ui.page.confusion import confusion_html
from trimtab.ui.page.curve import curve_html
from trimtab.ui.page.knee import knee_html
from trimtab.ui.page.layer_heat import layer_heat_html
from trimtab.ui.page.notice import done, note, problem
from trimtab.ui.page.plain_text import plain
from trimtab.ui.page.progress_bar import progress_bar
from trimtab.ui.page.scores import doses_html, scores_html
from trimtab.ui.receipt_line import spans


def build_label(state: dict[str, Any]) -> str:
    """Return a build in a few words, for a list."""
    return f"{state['kind']} {state['artifact']}: {state['status']}"


def stage_html(state: dict[str, Any]) -> str:
    """Return what a build does now, in words that change with its stage alone.

    Screen readers speak it at each change; the numbers are in `progress_html`.
    """
    if not is_under_way(state):
        return ""
    what = f"The {state['kind']} {state['artifact']}"
    if state["status"] == "queued":
        n = state["position"]
        said = f"{what} waits" + (f"; {n} job{'' if n == 1 else 's'} before it." if n else ".")
    else:
        said = f"{what}: {state['stage'] or 'starting'}."
    return f'<p role="status" aria-live="polite">{plain(said)}</p>'


def progress_html(state: dict[str, Any]) -> str:
    """Return a build's bar and numbers."""
    if not is_under_way(state):
        return ""
    done_of, total, elapsed = state["done"], state["total"], state["elapsed_s"]
    numbers = f"{done_of} of {total}, {elapsed:.0f} s" if total else f"{elapsed:.0f} s"
    bar = progress_bar(numbers, done=done_of, total=total)
    return (
        f"{bar}"
        '<p class="tt-hint">The server builds it beside the chats. It goes on when you close this '
        "page; come back here to see it, or cancel it.</p>"
    )


def end_html(state: dict[str, Any]) -> str:
    """Return the notice on how a build ended; empty while it is under way."""
    what = f"The {state['kind']} {state['artifact']}"
    error = (state["error"] or {}).get("message")
    if state["status"] == "done":
        said = done(f"{what} is built and stored, after {state['elapsed_s']:.0f} s.")
        return said + (problem(error) if error else "")
    if state["status"] == "failed":
        return problem(f"{what} could not be built, and nothing was stored. {error or ''}")
    if state["status"] == "cancelled":
        return note(f"{what} was cancelled; nothing was stored.")
    return ""


def result_html(state: dict[str, Any]) -> str:
    """Return what was measured of the artifact that a build came to."""
    card = state["result"]
    if card is None:
        return ""
    drawn = _vector(card) if state["kind"] == "vector" else _classifier(card)
    return f'<section aria-label="Result"><h2>{plain(card["id"])}</h2>{drawn}</section>'


def _vector(card: dict[str, Any]) -> str:
    calibration = card["calibration"]
    if calibration is None:
        return note(
            f"Not calibrated: it steers {spans(card['default_layers'])}, and nobody measured where "
            "the text breaks. Calibrate it to see its effect and damage."
        )
    return knee_html(calibration) + layer_heat_html(calibration) + curve_html(calibration)


def _classifier(card: dict[str, Any]) -> str:
    return confusion_html(card) + scores_html(card) + doses_html(card)

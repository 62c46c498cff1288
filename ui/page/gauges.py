"""Signs that an answer falls apart: dose, repetition, and the unsteered model's surprise."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.training.repetition import repetition
from trimtab.ui.page.conversation import Answer, Turn
from trimtab.ui.page.plain_text import plain

_WINDOW = 48  # tokens: what happens now, not what was fine at the beginning
_LOOPS = 0.3  # share of repeated 3-grams (training/coherence.py)
_NEARLY = 0.15
# Nats a token above the baseline's own: perplexity 1.5 and 2 times as high.
_STRANGE = 0.405
_VERY_STRANGE = 0.693

_WORDS = {"good": "fine", "warn": "strained", "bad": "breaking"}


@dataclass(frozen=True)
class Gauge:
    """One measure. `level` is `good`, `warn`, `bad` or `none` while nothing is known."""

    name: str
    value: str
    level: str
    explanation: str


def repetition_gauge(answer: Answer) -> Gauge:
    """Return the share of 3-grams of the last tokens that were said before."""
    share = repetition(answer.tokens[-_WINDOW:])
    level = "bad" if share > _LOOPS else "warn" if share > _NEARLY else "good"
    return Gauge(
        "Repetition",
        f"{share:.0%}",
        level if answer.tokens else "none",
        f"Share of 3-token runs among the last {_WINDOW} tokens that occurred before; past "
        f"{_LOOPS:.0%} an answer loops.",
    )


def surprise_gauge(turn: Turn) -> Gauge:
    """Return how odd the unsteered model finds the steered answer, beside its own."""
    steered, own = (_mean(turn.side(side)) for side in ("steered", "baseline"))
    explanation = (
        "Mean -log P a token of the last part of the steered answer, as the unsteered model reads "
        "it. Compared with its own answer: half as much perplexity again is strained, twice breaks."
    )
    if turn.steered.unread is not None:
        return Gauge("Surprise", "unknown", "none", turn.steered.unread)
    if steered is None:
        return Gauge("Surprise", "…", "none", explanation)
    more = 0.0 if own is None else steered - own
    level = "bad" if more > _VERY_STRANGE else "warn" if more > _STRANGE else "good"
    beside = "" if own is None else f" (own {own:.2f})"
    return Gauge("Surprise", f"{steered:.2f} nats{beside}", level, explanation)


def _mean(answer: Answer) -> float | None:
    nats = [nats for _, nats in answer.surprise[-_WINDOW:]]
    return sum(nats) / len(nats) if nats else None


def gauges_html(turn: Turn | None) -> str:
    """Return a turn's gauges, each with its value and a word: never by colour alone."""
    if turn is None:
        return ""
    gauges = [repetition_gauge(turn.steered), surprise_gauge(turn)]
    worst = max((g.level for g in gauges), key=("none", "good", "warn", "bad").index)
    drawn = "".join(_drawn(gauge) for gauge in gauges)
    warning = ""
    if worst == "bad":
        warning = (
            '<p class="tt-warning" role="status">The text is falling apart: move the sliders '
            "toward 0, or steer fewer things at once.</p>"
        )
    return f'<div class="tt-gauges">{drawn}{_dose(turn.dose)}</div>{warning}'


def _drawn(gauge: Gauge) -> str:
    word = _WORDS.get(gauge.level, "")
    return (
        f'<div class="tt-gauge tt-{gauge.level}" title="{plain(gauge.explanation)}">'
        f"<span>{gauge.name}</span> <b>{plain(gauge.value)}</b> <i>{word}</i></div>"
    )


def _dose(dose: dict[str, float]) -> str:
    """Return a bar a layer; full height is the whole length of the hidden state there."""
    if not dose:
        return '<div class="tt-gauge tt-none"><span>Dose</span> <b>none</b></div>'
    bars = "".join(
        f'<span class="tt-bar" title="layer {layer}: {share:.3f} of |h|">'
        f'<i style="height:{min(share, 1.0) * 100:.0f}%"></i><small>{layer}</small></span>'
        for layer, share in sorted(dose.items(), key=lambda item: int(item[0]))
    )
    most = max(dose.values())
    title = "Length of the change relative to the hidden state's, at each steered layer."
    return (
        f'<div class="tt-gauge tt-dose" title="{title}"><span>Dose</span> '
        f'<b>up to {most:.2f}</b> <span class="tt-bars">{bars}</span></div>'
    )

"""The two sides of a conversation as HTML. All text in it is a stranger's, and is escaped."""

from __future__ import annotations

from trimtab.ui.page.conversation import SIDES, Answer, Conversation, Piece, Turn
from trimtab.ui.page.plain_text import plain
from trimtab.ui.receipt_line import receipt_line

PLAIN, SURPRISE = "nothing", "surprise"
_HEADINGS = {"baseline": "Unsteered", "steered": "Steered"}
_ENDS = {
    "length": "cut at the longest length",
    "stopped": "stopped",
    "failed": "failed",
}
_MOST_NATS = 6.0  # full colour


def past_html(conversation: Conversation, *, colour: str = PLAIN) -> str:
    """Return all turns but the last, one under the other; nothing in them changes any more.

    Args:
        conversation: what was said.
        colour: what the answers' tokens are coloured by: `nothing`, `surprise`, or a probe's name.
    """
    turns = enumerate(conversation.turns[:-1], start=1)
    return "".join(_turn(turn, i, colour) for i, turn in turns)


def last_html(conversation: Conversation, *, colour: str = PLAIN) -> str:
    """Return the last turn, which may be growing, or where it will be.

    Args:
        conversation, colour: as for `past_html`.
    """
    n = len(conversation.turns)
    turn = conversation.turns[-1] if n else None
    return _turn(turn, n, colour, is_running=conversation.is_running)


def _turn(turn: Turn | None, number: int, colour: str, *, is_running: bool | None = None) -> str:
    sides = "".join(_side(turn, number, side, colour, is_running) for side in SIDES)
    return f'<div class="tt-sides" data-turn="{number}">{sides}</div>'


def _side(turn: Turn | None, number: int, side: str, colour: str, is_running: bool | None) -> str:
    live = "" if is_running is None else ' aria-live="polite"'
    busy = ' aria-busy="true"' if is_running else ""
    said = '<p class="tt-empty">Ask something below.</p>'
    if turn is not None:
        prompt = plain(turn.settings.prompt)
        said = f'<p class="tt-said" dir="auto">{prompt}</p>{_answer(turn, side, colour)}'
    heading = _HEADINGS[side]
    return (
        f'<section class="tt-side" data-side="{side}" aria-label="{heading}, turn {number}">'
        f"<h2>{heading}</h2><div{live}{busy}>{said}</div></section>"
    )


def _answer(turn: Turn, side: str, colour: str) -> str:
    answer = turn.side(side)
    body = "".join(_spans(answer, colour))
    caret = '<span class="tt-caret" aria-hidden="true"></span>' if answer.finish is None else ""
    foot = [_ENDS[answer.finish]] if answer.finish in _ENDS else []
    if side == "steered" and answer.receipt is not None:
        foot.append(receipt_line(answer.receipt))
    elif side == "steered" and not turn.settings.is_steered:
        foot.append("nothing is chosen to steer with")
    error = (
        f'<p class="tt-notice tt-problem" role="alert">{plain(answer.error)}</p>'
        if answer.error
        else ""
    )
    return (
        f'<div class="tt-answer" dir="auto" translate="no">{body}{caret}</div>{error}'
        f'<p class="tt-foot">{plain("; ".join(foot))}</p>'
    )


def _spans(answer: Answer, colour: str) -> list[str]:
    spans, end = [], 0
    read = (one for one in answer.surprise if one[0] > 0)
    token = next(read, None)
    for piece in answer.pieces:
        end += len(piece.text)
        nats: float | None = None  # of the tokens that end within the piece
        while token is not None and token[0] <= end:
            nats = (nats or 0.0) + token[1]
            token = next(read, None)
        title = _title(piece, nats)
        spans.append(
            f'<span style="{_style(piece, nats, colour)}" title="{plain(title)}">'
            f"{plain(piece.text)}</span>"
        )
    return spans


def _title(piece: Piece, nats: float | None) -> str:
    lines = [f"P {2.718281828**piece.logprob:.1%} for the model that said it"]
    if nats is not None:
        lines.append(f"surprise {nats:.2f} nats for the unsteered model")
    for probe, labels in piece.readings.items():
        read = ", ".join(f"{label} {share:.2f}" for label, share in labels.items())
        lines.append(f"{probe}: {read}")
    return "\n".join(lines)


def _style(piece: Piece, nats: float | None, colour: str) -> str:
    if colour == SURPRISE and nats is not None:
        return _mix("--tt-minus", min(nats / _MOST_NATS, 1.0))
    labels = piece.readings.get(colour)
    if not labels:
        return ""
    if len(labels) == 1:
        (share,) = labels.values()
        sign = "--tt-plus" if share >= 0.5 else "--tt-minus"
        return _mix(sign, abs(share - 0.5) * 2)
    names = list(labels)
    best = max(names, key=lambda name: labels[name])
    return _mix(f"--tt-label-{names.index(best) % N_LABEL_COLOURS}", labels[best])


def _mix(name: str, share: float) -> str:
    return f"background:color-mix(in srgb, var({name}) {round(share * 70)}%, transparent)"


# Okabe and Ito's palette, which the colour-blind can tell apart (jfly.uni-koeln.de/color).
LABEL_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
N_LABEL_COLOURS = len(LABEL_COLOURS)


def legend_html(colour: str, labels: dict[str, list[str]]) -> str:
    """Return what the colours of the tokens mean.

    Args:
        colour: as for `conversation_html`.
        labels: of each classifier that may be read.
    """
    if colour == PLAIN:
        return ""
    if colour == SURPRISE:
        return (
            '<p class="tt-legend">The stronger the blue, the less the unsteered model expected the '
            f"word; full colour is {_MOST_NATS:g} nats.</p>"
        )
    names = labels.get(colour, [])
    if not names:
        return f'<p class="tt-legend">Red: {plain(colour)}. Blue: its opposite.</p>'
    keys = "".join(
        f'<span><i style="background:var(--tt-label-{i % N_LABEL_COLOURS})"></i>'
        f"{plain(name)}</span>"
        for i, name in enumerate(names)
    )
    return f'<p class="tt-legend">{keys}</p>'

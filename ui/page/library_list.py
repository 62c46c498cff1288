"""The Library's list: a card for each stored thing, and the files that cannot be read."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import Any

from trimtab.ui.page.library import KINDS, Item, Library, named
from trimtab.ui.receipt_line import spans
from trimtab.ui.visible_text import visible

ORDERS = {"A to Z": "up", "Z to A": "down", "newest first": "new"}
_LONGEST = 160
_PARTS = ("fit", "calibration", "validation", "held")


def list_html(
    library: Library, kind: str, *, search: str = "", order: str = "up", chosen: Item | None = None
) -> str:
    """Return the list of one kind. A button with `data-id` chooses.

    Args:
        library: all that is stored.
        kind: `vector`, `classifier` or `preset`.
        search: words that all must be in a card's own words, in any case.
        order: one of the values of `ORDERS`.
        chosen: what is shown beside the list.
    """
    cards = library.cards[kind]
    shown = [card for card in cards.values() if _has(card, kind, search)]
    shown.sort(key=lambda card: (card["id"].lower(), card["id"]), reverse=order == "down")
    if order == "new":
        # Presets do not know when they were saved; they stay by name.
        shown.sort(key=lambda card: str(card.get("created", "")), reverse=True)
    rows = "".join(_row(card, kind, is_chosen=Item(kind, card["id"]) == chosen) for card in shown)
    plural = KINDS[kind]
    if not cards:
        count = f"No {plural} are stored yet."
    elif len(shown) == len(cards):
        count = f"{len(cards)} {plural if len(cards) > 1 else kind}"
    else:
        count = f"{len(shown)} of {len(cards)} {plural}"
    return (
        f'<p class="tt-hint" role="status">{count}</p><ul class="tt-cards">{rows}</ul>'
        f"{problems_html(library.problems[kind])}"
    )


def problems_html(problems: dict[str, str]) -> str:
    """Return the files that cannot be read, each with its reason."""
    if not problems:
        return ""
    rows = "".join(
        f"<li><b>{text(file)}</b>: {text(why)}</li>" for file, why in sorted(problems.items())
    )
    head = (
        "1 file cannot be read" if len(problems) == 1 else f"{len(problems)} files cannot be read"
    )
    return f'<div class="tt-notice tt-problem" id="library-problems">{head}:<ul>{rows}</ul></div>'


def text(value: Any) -> str:
    """Return a stranger's text as HTML that shows all of it and does nothing."""
    return escape(visible(str(value), mark=""))


def made(created: str) -> str:
    """Return a time for people; one that is none as it stands."""
    try:
        return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M}"
    except ValueError:
        return created


def weights(card: dict[str, Any]) -> str:
    """Return what a card's model ran on, for people."""
    model = card["model"]
    if model.get("fingerprint") is None:
        return "weights unknown"
    return str(model.get("quantization") or "unquantised weights")


def built_from(card: dict[str, Any]) -> str:
    """Return the name of the data something was built on, and how many examples of it.

    What was held back took no part.
    """
    data = card["data"]
    counts = [n for part, n in sizes(data).items() if part != "held"]
    size = f" ({sum(counts)} examples)" if counts else ""
    return f"{data['name']}{size}" if "name" in data else "unknown data"


def sizes(data: dict[str, Any]) -> dict[str, int]:
    """Return how many examples each part of the data had: `fit`, `held` and so on."""
    given = {part: data.get(f"n_{part}") for part in _PARTS}
    return {part: n for part, n in given.items() if isinstance(n, int)}


def _vector(card: dict[str, Any]) -> str:
    dose = "calibrated" if card["calibration"] is not None else "not calibrated"
    return f"{card['method']}, {spans(card['default_layers'])}, {dose}"


def _classifier(card: dict[str, Any]) -> str:
    dose = "calibrated" if card["doses"] else "not calibrated"
    return f"{', '.join(card['labels'])}; {spans(card['default_layers'])}, {dose}"


def _preset(card: dict[str, Any]) -> str:
    return "; ".join(f"{item.kind} {item.id}" for item in named(card["spec"]))


def _lines(card: dict[str, Any], kind: str) -> list[str]:
    if kind == "preset":
        return [_preset(card), f"model {card['model']}"]
    by = f"by trimtab {card['trimtab_version']}" if card["trimtab_version"] else ""
    origin = [f"from {built_from(card)}", weights(card), f"{made(card['created'])} {by}".strip()]
    facts = _vector(card) if kind == "vector" else _classifier(card)
    return [facts, ", ".join(filter(None, origin)), card["description"]]


def _has(card: dict[str, Any], kind: str, search: str) -> bool:
    words = " ".join([card["id"], *_lines(card, kind)]).lower()
    return all(word in words for word in search.lower().split())


def _row(card: dict[str, Any], kind: str, *, is_chosen: bool) -> str:
    lines = "".join(
        f'<p title="{text(line)}">{text(line[:_LONGEST])}{"…" * (len(line) > _LONGEST)}</p>'
        for line in _lines(card, kind)
        if line
    )
    return (
        f'<li class="tt-card" data-id="{text(card["id"])}" data-chosen="{is_chosen}">'
        f'<button type="button" aria-pressed="{str(is_chosen).lower()}">{text(card["id"])}</button>'
        f"{lines}</li>"
    )

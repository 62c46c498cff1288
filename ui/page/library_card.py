"""One stored thing in full: where it comes from, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from trimtab.ui.page.confusion import confusion_html
from trimtab.ui.page.curve import curve_html
from trimtab.ui.page.knee import knee_html
from trimtab.ui.page.layer_heat import layer_heat_html
from trimtab.ui.page.library import Item, Library, named
from trimtab.ui.page.library_list import made, sizes, text, weights
from trimtab.ui.page.notice import note
from trimtab.ui.page.probe_bars import probe_bars_html
from trimtab.ui.page.scores import doses_html, scores_html
from trimtab.ui.receipt_line import spans

_LONGEST = 300
_HASH = 64


def card_html(item: Item, card: dict[str, Any], library: Library) -> str:
    """Return the whole of what is known of a vector, classifier or preset.

    Args:
        item: what it is.
        card: what the API tells of it.
        library: all that is stored beside it.
    """
    head = f"<h2>{text(item.id)}</h2>"
    if item.kind == "preset":
        return f"{head}{_preset(card, library)}"
    if card["description"]:
        head += f"<p>{text(card['description'])}</p>"
    body = _vector(card) if item.kind == "vector" else _classifier(card)
    return f"{head}{_users(library.presets_naming(item))}{body}"


def facts_html(facts: list[tuple[str, Any]]) -> str:
    """Return names and values as a list; a long hash is cut, and whole in its title."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{_value(value)}</dd>" for name, value in facts)
    return f'<dl class="tt-facts">{rows}</dl>'


def _vector(card: dict[str, Any]) -> str:
    norms, calibration = card["norms"], card["calibration"]
    facts = [
        ("method", card["method"]),
        *_origin(card),
        ("steers at", f"{spans(card['default_layers'])} by default"),
        ("has rows for", spans(card["layers"])),
        ("row lengths", f"{min(norms):.3g} to {max(norms):.3g}"),
        ("keeps lengths", "yes" if card["normalize"] else "no"),
        ("calibrated", "no: scale 1 is the raw length" if calibration is None else "yes"),
        *_made(card),
    ]
    drawn = ""
    if calibration is not None:
        drawn = (
            f"<h3>What was chosen</h3>{knee_html(calibration)}"
            f"<h3>Dose and response</h3>{curve_html(calibration)}"
            f"<h3>Layers and scales</h3>{layer_heat_html(calibration)}"
        )
    return f"{facts_html(facts)}{probe_bars_html(card)}{drawn}"


def _classifier(card: dict[str, Any]) -> str:
    hidden = card["hidden_units"]
    facts = [
        ("labels", ", ".join(card["labels"])),
        ("of a text", "one label" if card["is_exclusive"] else "any number of labels"),
        ("network", f"{' and '.join(map(str, hidden))} hidden units" if hidden else "linear"),
        *_origin(card),
        ("read at", f"layer {card['probe_layer']} by probes"),
        ("guides at", f"{spans(card['default_layers'])} by default"),
        ("has", spans(card["layers"])),
        *_made(card),
    ]
    return (
        f"{facts_html(facts)}<h3>How well it reads</h3>{scores_html(card)}"
        f"<h3>What it takes for what</h3>{confusion_html(card)}"
        f"<h3>How far it may steer</h3>{doses_html(card)}"
    )


def _preset(card: dict[str, Any], library: Library) -> str:
    rows = "".join(
        f"<li>{text(item)}{'' if item in library else ', <b>which is not stored here</b>'}</li>"
        for item in named(card["spec"])
    )
    missing = [str(item) for item in named(card["spec"]) if item not in library]
    warning = ""
    if missing:
        said = f"It names {' and '.join(missing)}, not stored here: requests for it fail."
        warning = f'<div class="tt-notice tt-problem">{text(said)}</div>'
    spec = text(json.dumps(card["spec"], indent=2, ensure_ascii=False))
    return (
        f"{warning}{facts_html([('model', card['model'])])}"
        f'<h3>Names</h3><ul class="tt-list">{rows}</ul>'
        f'<h3>Spec</h3><pre class="tt-spec" tabindex="0">{spec}</pre>'
    )


def _users(presets: list[str]) -> str:
    if not presets:
        return ""
    return note(f"Named by the preset{'s' * (len(presets) > 1)} {', '.join(presets)}.")


def _origin(card: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    data = card["data"]
    if card["settings"]:
        yield "settings", ", ".join(f"{key} {_short(x)}" for key, x in card["settings"].items())
    parts = [f"{n} {part}" for part, n in sizes(data).items()]
    yield "data", ", ".join([str(data.get("name", "the file does not say")), *parts])
    told = {"name", "probe_accuracy", "skipped", *(f"n_{part}" for part in sizes(data))}
    for key, value in data.items():
        if key not in told:
            yield f"data's {key.removeprefix('n_')}", value
    skipped = data.get("skipped")
    if isinstance(skipped, dict) and skipped:
        yield "left out", ", ".join(f"{n} with {why}" for why, n in skipped.items())


def _made(card: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    model = card["model"]
    size = f"{model['model_type']}, width {model['hidden_size']}"
    yield "model", f"{model['id']} ({size})"
    yield "fingerprint", model["fingerprint"] or "the file does not say"
    yield "measured on", weights(card)
    yield "made", f"{made(card['created']) or 'unknown'} UTC"
    yield "by", f"trimtab {card['trimtab_version']}" if card["trimtab_version"] else "unknown"
    yield "digest", card["digest"]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_short(x)}" for key, x in value.items())
    whole = _short(value)
    if len(whole) == _HASH and " " not in whole:
        return f'<code title="{text(whole)}">{text(whole[:12])}…</code>'
    if len(whole) > _LONGEST:
        return f'<span title="{text(whole[: 10 * _LONGEST])}">{text(whole[:_LONGEST])}…</span>'
    return text(whole)

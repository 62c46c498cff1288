"""How well a vector's probe tells its two sides apart: a bar a layer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from trimtab.ui.page.notice import note
from trimtab.ui.receipt_line import spans

# A file from elsewhere may say anything here.
_SHARES = TypeAdapter(list[Annotated[float, Field(ge=0, le=1)]])


def probe_bars_html(card: dict[str, Any]) -> str:
    """Return the shares of texts kept from the fit that a probe puts on their side, by layer.

    Args:
        card: a vector's.
    """
    if card["probe_layer"] is None:
        return note("It carries no probe: it can steer, and neither gate nor read.")
    head = f"<h3>How well its probe reads</h3><p>Requests read it at layer {card['probe_layer']}."
    try:
        shares = _SHARES.validate_python(card["data"].get("probe_accuracy"))
    except ValidationError:
        return f"{head} The file does not say how well at each layer.</p>"
    layers = card["layers"]
    if len(shares) != len(layers):
        return f"{head} The file does not say how well at each layer.</p>"
    best, worst = max(shares), min(shares)
    at_best = spans([layer for layer, share in zip(layers, shares, strict=True) if share == best])
    at_worst = spans([layer for layer, share in zip(layers, shares, strict=True) if share == worst])
    bars = "".join(
        f'<span class="tt-bar" title="layer {layer}: {share:.1%} right">'
        # Guessing is right on half: no bar there, the whole height for always right.
        f'<i style="--share:{max(0.0, 2 * share - 1):.2f}"></i><small>{layer}</small></span>'
        for layer, share in zip(layers, shares, strict=True)
    )
    return (
        f"{head} Right on pairs kept from its fit: {best:.1%} at {at_best}, {worst:.1%} at "
        f"{at_worst}; guessing is right on half, where bars begin.</p>"
        '<div class="tt-bars-box" tabindex="0" role="region" '
        f'aria-label="Probe accuracy by layer"><div class="tt-bars tt-shares">{bars}</div></div>'
    )

"""What the steering panel offers: the server's vectors, classifiers and presets, ready to draw."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from trimtab.ui.page.api import Api
from trimtab.ui.page.damage import zones
from trimtab.ui.receipt_line import spans

REACH = 4.0  # calibration measures no further


async def catalogue(api: Api) -> dict[str, Any]:
    """Return the panel's catalogue, plain JSON.

    Returns:
        `{"reach", "vectors": [{"id", "about", "zones"}], "classifiers": [{"id", "labels",
        "about"}], "presets": [id], "readers": [id], "probes": [name]}`, readers being what may
        be read as a probe with all its labels, probes also single labels.

    Raises:
        ServerError: the server cannot be asked.
    """
    vectors, classifiers, presets = await asyncio.gather(
        *(api.get(f"/v1/steering/{kind}") for kind in ("vectors", "classifiers", "presets"))
    )
    probes = [card["id"] for card in vectors["data"] if card.get("probe_layer") is not None]
    return {
        "reach": REACH,
        "vectors": [_vector(card) for card in vectors["data"]],
        "classifiers": [_classifier(card) for card in classifiers["data"]],
        "presets": [preset["id"] for preset in presets["data"]],
        "readers": [*(card["id"] for card in classifiers["data"]), *probes],
        "probes": [
            *(f"{card['id']}/{label}" for card in classifiers["data"] for label in card["labels"]),
            *probes,
        ],
    }


def _vector(card: dict[str, Any]) -> dict[str, Any]:
    about = f"{card['method']}, {spans(card['default_layers'])}"
    if card["description"]:
        about = f"{card['description']} ({about})"
    if card["calibration"] is None:
        about += "; not calibrated: nobody measured where the text breaks"
    return {
        "id": card["id"],
        "about": about,
        "zones": [asdict(zone) for zone in zones(card["calibration"], reach=REACH)],
    }


def _classifier(card: dict[str, Any]) -> dict[str, Any]:
    doses = [f"{_labels(dose)}: {dose['dose']:g}" for dose in card["doses"]]
    known = f"calibrated doses: {', '.join(doses)}" if doses else "no dose is calibrated"
    return {"id": card["id"], "labels": card["labels"], "about": known}


def _labels(dose: dict[str, Any]) -> str:
    return " + ".join(dose["target"]) or "away from " + " + ".join(dose["avoid"])

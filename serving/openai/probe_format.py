"""What a request's probes read, as it stands in a choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.steering.plan import ProbeRow, Reader

_DIGITS = 4


def probe_readings(readers: Sequence[Reader], rows: Sequence[ProbeRow]) -> dict[str, Any]:
    """Return the field `probes` of a choice, empty if nothing was asked for.

    Args:
        readers: the request's probes.
        rows: what they read, a row a token.

    Returns:
        `{"probes": {id: {"layer", "labels", "tokens": [[probability a label], a row a token]}}}`
    """
    if not readers:
        return {}
    return {
        "probes": {
            reader.id: {
                "layer": reader.layer,
                "labels": list(reader.labels),
                "tokens": [[round(p, _DIGITS) for p in row[i]] for row in rows],
            }
            for i, reader in enumerate(readers)
        }
    }

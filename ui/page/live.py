"""How every event of the page runs."""

from __future__ import annotations

from typing import Any

LIVE: dict[str, Any] = {
    "show_progress": "hidden",  # the page shows its own
    "concurrency_limit": None,  # nobody waits for another visitor
    "api_visibility": "private",  # the API is the server's
}

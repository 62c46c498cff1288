"""Steering as part of what vLLM's prefix cache knows a block by.

Keys and values computed under steering must never serve a request that is steered otherwise. vLLM
hashes a block's tokens together with the request's `cache_salt` (in the first block, and every
later hash contains the one before) and with extra keys a block; both are set where the scheduler
makes its own record of a request, so that no route around our app can leave them out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from trimtab.serving.engines.vllm.plan_wire import KEY


def cache_rule(sampling_params: Any) -> Mapping[str, Any] | None:
    """Return a request's rule as `plan_wire` packed it; None for an unsteered request."""
    carried = (getattr(sampling_params, "extra_args", None) or {}).get(KEY)
    rule: Mapping[str, Any] | None = carried.get("cache") if isinstance(carried, dict) else None
    return rule


def salted(
    user_salt: str | None, rule: Mapping[str, Any], *, request_id: str, shares_outside: bool
) -> str | None:
    """Return the salt of a steered request.

    Args:
        user_salt: what the client gave to keep its prompts apart; it goes on doing so.
        rule: the request's.
        request_id: vLLM's id, for a request that shares with nobody.
        shares_outside: whether blocks go to a store that knows only salts, no extra keys; then a
            plan that only touches the answer is kept apart from the first block on.
    """
    own = rule["salt"]
    if rule["alone"]:
        own = f"alone {request_id}"
    elif own is None and shares_outside:
        own = rule["answer"]
    if own is None:
        return user_salt
    return hashlib.sha256(f"trimtab {own} {user_salt or ''}".encode()).hexdigest()


def answer_key(request: Any, end: int) -> tuple[str, str] | None:
    """Return the extra key of the block that ends before position `end`, if it needs one."""
    rule = cache_rule(request.sampling_params)
    if rule is None or rule["answer"] is None or end <= request.num_prompt_tokens:
        return None
    return ("trimtab", rule["answer"])

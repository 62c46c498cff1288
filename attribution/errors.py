"""Errors of attribution."""

from __future__ import annotations

from trimtab.steering.errors import TrimtabError


class AttributionError(TrimtabError):
    """An attribution that cannot be computed as asked."""

    code = "invalid_attribution"


class NonFiniteError(AttributionError):
    """The scores came out as NaN or infinity."""

    status = 422
    code = "non_finite_attribution"


class TooLargeError(AttributionError):
    """An attribution that needs more work or memory than it may take."""

    status = 413
    code = "attribution_too_large"


class CancelledError(AttributionError):
    """The work was called off before it was done."""

    status = 499
    code = "cancelled"

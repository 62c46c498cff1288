"""Where a bounded piece of work on the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Slices(Protocol):
    """Runs a piece of work where and when the model is free, and gives back what it returns.

    A server's runs it on the model's thread between two steps of the batch, and raises
    `CancelledError` instead once the job it belongs to is called off.
    """

    def __call__(self, work: Callable[[], T]) -> T:
        """Run it and return its result."""
        ...


def directly(work: Callable[[], T]) -> T:
    """Run a slice at once, on this thread."""
    return work()

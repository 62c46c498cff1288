"""Pieces of other work on the model's thread, between two steps of the batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from trimtab.serving.engines.base import EngineError

T = TypeVar("T")


class SliceQueue:
    """Work that wants the model, first come first served. `submit` comes from any thread.

    While sequences are being generated, slices get at most `share` of the model's time: after one
    the batch goes on for its fair time, so no sequence ever waits for more than one slice.

    Args:
        share: of the model's time, over 0 up to 1.

    Attributes:
        longest_s: the longest slice so far, seconds.
    """

    def __init__(self, *, share: float = 0.5) -> None:
        self.share = share
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.Lock()
        self.longest_s = 0.0
        self._owed_s = 0.0
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work.

        Raises:
            EngineError: the queue is closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise _stopped()
            self._waiting.append((work, future))
        return future

    def stepped(self, seconds: float) -> None:
        """Count the time of a step of the batch."""
        self._owed_s = max(0.0, self._owed_s - seconds)

    def run_next(self, *, is_busy: bool) -> None:
        """Run the next slice, if it is its turn. Never raises: the future carries the error.

        Args:
            is_busy: sequences are being generated.
        """
        if is_busy and self._owed_s > 0:
            return
        with self._lock:
            if not self._waiting:
                return
            work, future = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        began = time.perf_counter()
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        took_s = time.perf_counter() - began
        self.longest_s = max(self.longest_s, took_s)
        self._owed_s = took_s * (1 - self.share) / self.share

    def close(self) -> None:
        """Refuse what still waits and what comes later."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            future.set_exception(_stopped())


def _stopped() -> EngineError:
    return EngineError("The engine has stopped.")

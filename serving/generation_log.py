"""The operator's record of prompts and answers: a JSON line a choice, written beside the server."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trimtab.serving.engines.base import Delta
from trimtab.serving.metrics import Metrics
from trimtab.steering.errors import TrimtabError

log = logging.getLogger("trimtab.serving")

# A prompt may have megabytes: a disk that hangs must not fill the memory with them.
_MAX_WAITING = 256

Watch = Callable[[int, Delta], None]
"""Takes in one delta of choice `index`."""


class GenerationLog:
    """Appends what was generated to a file, on a thread of its own.

    Nothing here fails a request: what cannot be written is counted in
    `trimtab_generations_not_logged_total`, and each reason is said once in the server's log.

    Args:
        path: the file; made if it is not there, then for its owner's eyes only.
        max_bytes: size at which logging stops until the server is started again.
        metrics: where lines are counted.

    Raises:
        TrimtabError: the file cannot be opened, or is not a plain one.
    """

    def __init__(self, path: Path, *, max_bytes: int, metrics: Metrics) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._fd = _opened(path)
        self._size = os.fstat(self._fd).st_size
        # A writer that was killed leaves half a line; ours must not be glued to it.
        self._ends_line = not self._size or os.pread(self._fd, 1, self._size - 1) == b"\n"
        self._is_full = False
        self._told: set[str] = set()
        self._room = threading.BoundedSemaphore(_MAX_WAITING)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="trimtab-generation-log")

    def recorder(self, n_choices: int, *, facts: Callable[[int], dict[str, Any]]) -> Watch:
        """Return what follows one request and has it logged once every choice has finished.

        A request that fails or is cancelled before leaves no line.

        Args:
            n_choices: of the request.
            facts: returns what a choice's line holds beside its text, plain JSON.
        """
        texts: list[list[str]] = [[] for _ in range(n_choices)]
        reasons: dict[int, str] = {}

        def note(index: int, delta: Delta) -> None:
            texts[index].append(delta.text)
            if delta.finish_reason is None:
                return
            reasons[index] = delta.finish_reason.value
            if len(reasons) == n_choices:
                self._hand_over(
                    [
                        {**facts(i), "text": "".join(texts[i]), "finish_reason": reasons[i]}
                        for i in range(n_choices)
                    ]
                )

        return note

    def close(self) -> None:
        """Write what waits, and close the file. Safe to call twice."""
        self._writer.shutdown(wait=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hand_over(self, lines: list[dict[str, Any]]) -> None:
        if not self._room.acquire(blocking=False):
            self._lose(len(lines), "busy", f"{_MAX_WAITING} requests wait for the disk")
            return
        try:
            self._writer.submit(self._write, lines)
        except RuntimeError:  # closed
            self._room.release()
            self._lose(len(lines), "error", "the server is stopping")

    def _write(self, lines: list[dict[str, Any]]) -> None:
        try:
            for line in lines:
                self._append(line)
        finally:
            self._room.release()

    def _append(self, line: dict[str, Any]) -> None:
        # ASCII, so that no line separator inside a text can end the line.
        data = json.dumps(line).encode() + b"\n"
        if not self._ends_line:
            data = b"\n" + data
        if self._is_full or self._size + len(data) > self._max_bytes:
            # For good: short answers that still fit would be a choice among what is kept.
            self._is_full = True
            self._lose(1, "limit", f"it has reached its limit of {self._max_bytes} bytes")
            return
        written = 0
        try:
            # Straight to the system, whole lines at a time: nothing waits in a buffer of ours.
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._lose(1, "error", error.strerror or str(error))
        else:
            self._metrics.generations_logged.inc()
        self._size += written
        if written:
            self._ends_line = written == len(data)

    def _lose(self, count: int, reason: str, why: str) -> None:
        self._metrics.generations_not_logged.labels(reason).inc(count)
        if reason not in self._told:
            self._told.add(reason)
            log.warning(
                "generations are not logged to %s: %s. Said once; "
                "trimtab_generations_not_logged_total at /metrics counts on.",
                self.path,
                why,
            )


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o600)
    except OSError as error:
        raise TrimtabError(
            f"The generation log {path} cannot be opened: {error.strerror}. Name a file that can "
            "be written, in a folder that exists."
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise TrimtabError(f"The generation log {path} is not a plain file; name another.")
    return handle

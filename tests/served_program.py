"""`trimtab serve` as people start it, in a process of its own, for as long as a block lasts."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cli_program import PROGRAM

READY = "Ready: "


@dataclass
class ServedProgram:
    """A server that is ready.

    Attributes:
        url: such as `http://127.0.0.1:40123`.
        lines: what it has said on stderr, growing.
    """

    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What it has said on stderr so far."""
        return "".join(self.lines)


@contextmanager
def serving(*args: str, **environment: str) -> Iterator[ServedProgram]:
    """Serve on a free port; end as Ctrl-C does.

    Args:
        args: after `trimtab serve`.
        environment: added to this process's own.

    Raises:
        AssertionError: it never became ready, did not end well or showed a traceback.
    """
    served = ServedProgram()
    urls: queue.Queue[str | None] = queue.Queue()

    def read(stderr: Iterator[str]) -> None:
        for line in stderr:
            served.lines.append(line)
            if line.startswith(READY):
                urls.put(line.removeprefix(READY).split("/v1")[0])
        urls.put(None)

    command = [sys.executable, "-P", "-c", PROGRAM, "serve", *args, "--port", "0"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=read, args=(process.stderr,))
        reader.start()
        try:
            url = urls.get(timeout=240)
            assert url is not None, f"it ended before it was ready:\n{served.log}"
            served.url = url
            yield served
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=60)
        finally:
            process.kill()
            reader.join()
    assert code == 0, served.log
    assert "Traceback" not in served.log, served.log

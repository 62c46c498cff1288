"""Commands that serve until Ctrl-C, as people start them, in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cli_program import PROGRAM

_SECONDS = 240


@dataclass
class ServedProgram:
    """A command that serves.

    Attributes:
        process: its own.
        lines: what it has said on stderr, growing.
        is_over: whether it has ended.
        is_stopping: whether Ctrl-C was pressed.
    """

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    is_over: bool = False
    is_stopping: bool = False
    _more: threading.Condition = field(default_factory=threading.Condition)

    @property
    def log(self) -> str:
        """What it has said on stderr so far."""
        return "".join(self.lines)

    @property
    def url(self) -> str:
        """Where it serves, such as `http://127.0.0.1:40123`; waits until it says so."""
        line = self.line("Ready: ", "Page: ")
        return line.split()[1].removesuffix("/v1").removesuffix("/ui")

    def line(self, *starts: str) -> str:
        """Wait for a line that begins in one of these ways.

        Raises:
            AssertionError: it ended without, or said none in minutes.
        """

        def found() -> str | None:
            return next((line for line in self.lines if line.startswith(starts)), None)

        with self._more:
            self._more.wait_for(lambda: found() or self.is_over, timeout=_SECONDS)
        line = found()
        assert line is not None, f"no line begins with {starts}:\n{self.log}"
        return line

    def press_ctrl_c(self) -> None:
        """Press it; a second time ends it at once."""
        self.is_stopping = True
        self.process.send_signal(signal.SIGINT)

    def read(self) -> None:
        """Take its lines until there are no more."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self.is_over = True
            self._more.notify_all()


@contextmanager
def started(
    *args: str,
    codes: tuple[int, ...] = (0,),
    python: str = sys.executable,
    **environment: str,
) -> Iterator[ServedProgram]:
    """Start a command; end as Ctrl-C does.

    Args:
        args: after `trimtab`; `--port 0` is added.
        codes: the statuses it may end with.
        python: the interpreter, of this environment or of another.
        environment: added to this process's own.

    Raises:
        AssertionError: it did not end well, or showed a traceback.
    """
    with subprocess.Popen(
        [python, "-P", "-c", PROGRAM, *args, "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        served = ServedProgram(process)
        reader = threading.Thread(target=served.read)
        reader.start()
        try:
            yield served
            if not served.is_stopping:
                served.press_ctrl_c()
            code = process.wait(timeout=60)
        finally:
            process.kill()
            reader.join()
    assert code in codes, served.log
    assert "Traceback" not in served.log, served.log


@contextmanager
def serving(
    *args: str, python: str = sys.executable, **environment: str
) -> Iterator[ServedProgram]:
    """`trimtab serve` as `started` does, ready."""
    with started("serve", *args, python=python, **environment) as served:
        assert served.url
        yield served

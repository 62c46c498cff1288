"""What the terminal commands share: results on stdout, progress on stderr, colour, tables, bars."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def has_colour(stream: TextIO) -> bool:
    """Return whether to colour what goes to a stream: a terminal, and NO_COLOR is not set."""
    return (
        stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"
    )


def styled(text: str, style: str, *, stream: TextIO | None = None) -> str:
    """Return the text in a style of `_STYLES`, plain where the stream takes no colour."""
    if not has_colour(stream or sys.stdout):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def out(text: str = "", *, end: str = "\n") -> None:
    """Print a piece of the result to stdout."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say(text: str = "") -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def out_json(value: Any) -> None:
    """Print the result as JSON to stdout."""
    out(json.dumps(value, indent=2, ensure_ascii=False))


def next_steps(*commands: str) -> None:
    """Say what to try next, one command a line, so that each can be copied."""
    label = styled("Next:", "bold", stream=sys.stderr)
    for i, command in enumerate(commands):
        say(f"{label if i == 0 else '     '} {command}")


def width() -> int:
    """Return the columns to write in: the terminal's, at most 100."""
    return min(shutil.get_terminal_size((80, 24)).columns, 100)


def wrapped(text: str, *, indent: str = "") -> str:
    """Return a text broken at the terminal's width, its own line breaks kept."""
    return "\n".join(
        textwrap.fill(line, width(), initial_indent=indent, subsequent_indent=indent)
        for line in text.splitlines()
    )


def can_show(text: str) -> bool:
    """Return whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def bar(share: float, room: int) -> str:
    """Return a bar of a share, 0 to 1, of so many columns."""
    return ("█" if can_show("█") else "#") * round(share * room)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return aligned columns: numbers to the right, the last column not padded."""
    texts = [[_cell(value) for value in row] for row in rows]
    sizes = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(size) if is_right else cell.ljust(size)
            for cell, size, is_right in zip(cells, sizes, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([styled(line(header), "bold"), *map(line, texts)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Stages:
    """Progress through named stages: a bar with an ETA on a terminal, a line a stage elsewhere.

    Call it with a stage's name, and with the steps done and in all where they are known.

    Attributes:
        seconds: stage -> how long it took, once it is over.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._bar: Any = None
        self._name: str | None = None
        self._began = 0.0

    def __call__(self, name: str, done: int | None = None, total: int | None = None) -> None:
        if name != self._name:
            self.close()
            self._name, self._began = name, time.perf_counter()
            if not sys.stderr.isatty():
                say(f"{name} ...")
            elif total:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=name, file=sys.stderr, ncols=width())
            else:
                # Steps that cannot be counted have no bar; the line says what is waited for.
                say(f"{name} ...")
        if self._bar is not None and done is not None:
            self._bar.total = total  # a stage may find that there is more to do
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the stage that is shown."""
        if self._name is not None:
            spent = time.perf_counter() - self._began
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
            self._name = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def spent(self) -> str:
        """Return where the time went: `reading 3.1 s, choosing layers 20.4 s`."""
        return ", ".join(f"{name.lower()} {s:.1f} s" for name, s in self.seconds.items())


@contextmanager
def stages() -> Iterator[Stages]:
    """Show stages for the time of a block."""
    shown = Stages()
    try:
        yield shown
    finally:
        shown.close()


def ask_to_confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; elsewhere `--yes` must have been given.

    Raises:
        click.UsageError: nobody is there to ask.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is there to ask: give --yes.")
    click.confirm(question, abort=True, err=True)

"""Labelled texts of a command: a file of them, instructions with questions, or a server's log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.ui.terminal import say

if TYPE_CHECKING:
    from trimtab.training.classifiers.examples import ExampleSet

_FILE = click.Path(path_type=Path)
_ONE = (
    "Give one of --bundled, --texts, --instructions with --questions, or --log with --label-from."
)
_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--bundled", metavar="NAME", help="A set that comes with trimtab: `tone`, five tones."
    ),
    click.option(
        "--texts",
        type=_FILE,
        metavar="FILE",
        help='JSON lines: {"text", "label"} or {"text", "labels"}; "prompt" and "split" if any.',
    ),
    click.option(
        "--instructions",
        type=_FILE,
        metavar="FILE",
        help='JSON {"label": "instruction"}: each is put before every question.',
    ),
    click.option(
        "--questions", type=_FILE, metavar="FILE", help='JSON lines: {"text"}, the questions.'
    ),
    click.option("--log", type=_FILE, metavar="FILE", help="A server's generation log."),
    click.option(
        "--label-from", metavar="PATH", help="Where a row of the log has its label: metadata.tone."
    ),
)


def example_options(command: Any) -> Any:
    """Add the options that `read_examples` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_examples(
    bundled: str | None,
    texts: Path | None,
    instructions: Path | None,
    questions: Path | None,
    log: Path | None,
    label_from: str | None,
) -> ExampleSet:
    """Return the labelled texts a command names, and say what of a log was left out.

    Raises:
        click.UsageError: none or several sources, or half of one.
        DataError: a file cannot be read, or is at fault at a named line.
    """
    if sum(source is not None for source in (bundled, texts, instructions or questions, log)) != 1:
        raise click.UsageError(_ONE)
    if (instructions is None) != (questions is None):
        raise click.UsageError("--instructions and --questions go together.")
    if (log is None) != (label_from is None):
        raise click.UsageError("--log and --label-from go together.")
    from trimtab.training.classifiers import readers

    if bundled is not None:
        return readers.bundled(bundled)
    if texts is not None:
        return readers.read_texts(texts)
    if instructions is not None and questions is not None:
        return readers.read_instructions(instructions, questions)
    assert log is not None  # the only source left
    assert label_from is not None
    data = readers.read_log(log, label_from=label_from)
    for reason, n in data.skipped.items():
        say(f"Left out: {n} rows of {log.name} with {reason}.")
    return data

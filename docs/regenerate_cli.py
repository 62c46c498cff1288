"""Write docs/cli.md from the --help pages, so that the two cannot disagree.

python docs/regenerate_cli.py            # writes the file
python docs/regenerate_cli.py --check    # exits with 1 if the file is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from trimtab.ui.cli import trimtab

FILE = Path(__file__).resolve().parent / "cli.md"
HEAD = """# The command line

Written by `python docs/regenerate_cli.py` from the `--help` pages; a test compares the two.
"""


def pages() -> str:
    """Return the whole file."""
    return HEAD + "".join(_page(context) for context in contexts(_context(trimtab, "trimtab")))


def contexts(above: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command and of all commands below it."""
    yield above
    command = above.command
    if isinstance(command, click.Group):
        for name in command.list_commands(above):
            below = command.get_command(above, name)
            assert below is not None
            yield from contexts(_context(below, name, above))


def _context(
    command: click.Command, name: str, above: click.Context | None = None
) -> click.Context:
    # A fixed width: the page must not depend on the terminal it was made in.
    settings = {**command.context_settings, "terminal_width": 100}
    return click.Context(command, info_name=name, parent=above, **settings)


def _page(context: click.Context) -> str:
    level = 2 if context.parent is None or context.parent.parent is None else 3
    return f"\n{'#' * level} {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


def main() -> None:
    """Write the file, or compare it."""
    text = pages()
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md is out of date. Run: python docs/regenerate_cli.py")


if __name__ == "__main__":
    main()

"""The command `trimtab`: finds the sub-command's file, and turns every failure into a sentence.

trimtab --help            # imports neither torch nor a web framework
TRIMTAB_DEBUG=1 trimtab vectors show warm
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from trimtab.steering.errors import TrimtabError, did_you_mean
from trimtab.ui.help_page import HelpfulGroup

# In the order of the help page: what a newcomer needs first comes first.
COMMANDS = {
    "demo": "trimtab.ui.commands.demo:demo",
    "serve": "trimtab.ui.commands.serve:serve",
    "ui": "trimtab.ui.commands.page:ui",
    "chat": "trimtab.ui.commands.chat:chat",
    "attribute": "trimtab.ui.commands.attribute:attribute",
    "vectors": "trimtab.ui.commands.vectors:vectors",
    "classifiers": "trimtab.ui.commands.classifiers:classifiers",
    "quantize": "trimtab.ui.commands.quantize:quantize",
    "presets": "trimtab.ui.commands.presets:presets",
    "methods": "trimtab.ui.commands.methods:methods",
    "bench": "trimtab.ui.commands.bench:bench",
    "doctor": "trimtab.ui.commands.doctor:doctor",
}


class LazyGroup(HelpfulGroup):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command of this name, or return None."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


def _print_version(ctx: click.Context, option: click.Parameter, is_given: bool) -> None:
    if is_given:
        from importlib.metadata import version

        click.echo(f"trimtab {version('trimtab')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    name="trimtab",
    examples=(
        "trimtab demo",
        "trimtab serve",
        "trimtab vectors build --concept optimistic",
        'trimtab chat --steer "1.0 optimistic"',
    ),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def trimtab() -> None:
    """Serve language models and steer each request from inside.

    Results go to stdout, progress to stderr. The exit code is 0, 1 (failed) or 2 (wrong usage).
    TRIMTAB_DEBUG=1 shows the traceback of a failure, TRIMTAB_HOME names the folder of vectors.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; failures are printed to stderr."""
    try:
        code = trimtab.main(list(args), prog_name="trimtab", standalone_mode=False)
        # Here and not at the interpreter's end, where a closed pipe could only be complained about.
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # `trimtab vectors list | head`: the reader has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.Abort, KeyboardInterrupt):
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("TRIMTAB_DEBUG"):
            import traceback

            traceback.print_exc()
        print(f"{_label()} {_paragraph(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, click.ClickException) else 1


def _label() -> str:
    from trimtab.ui.terminal import styled

    return styled("Error:", "red", stream=sys.stderr)


def _paragraph(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        return f"{_sentence(_usage_message(error))} Try: {_path_of(error)} --help"
    if isinstance(error, click.ClickException):
        return _sentence(error.format_message())
    if isinstance(error, TrimtabError):
        return " ".join(error.message.split())
    if isinstance(error, OSError):
        return f"{_sentence(str(error))} Check the path and its permissions."
    shown = " ".join(str(error).split())[:300]
    return (
        f"trimtab failed unexpectedly: {type(error).__name__}: {_sentence(shown)} "
        "Run it again with TRIMTAB_DEBUG=1 for the traceback, and `trimtab doctor` to check "
        "the installation."
    )


def _usage_message(error: click.UsageError) -> str:
    """Return click's message, with a suggestion for a mistyped command."""
    message = error.format_message()
    ctx: Any = error.ctx
    if message.startswith("No such command") and "ean" not in message and ctx is not None:
        typed = message.split("'")[1] if "'" in message else ""
        message += did_you_mean(typed, ctx.command.list_commands(ctx))
    return " ".join(message.split())


def _path_of(error: click.UsageError) -> str:
    return error.ctx.command_path if error.ctx is not None else "trimtab"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


if __name__ == "__main__":
    main()

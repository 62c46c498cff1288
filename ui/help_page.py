"""Help pages that end with examples: the commands' and groups' classes, and the page's layout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _WithExamples(click.Command):
    """Adds `-h` and a last section of runnable examples.

    Args:
        examples: command lines that work as they stand.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs["context_settings"] = CONTEXT | (kwargs.get("context_settings") or {})
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        # Docstrings are indented and wrapped for the source; the page wraps them anew.
        self.help = inspect.cleandoc(self.help or "")

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence for a list of commands, its second half dropped if too long."""
        sentence = (self.help or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
        while len(sentence) > limit and any(mark in sentence for mark in ":;,"):
            sentence = sentence[: max(sentence.rfind(mark) for mark in ":;,")]
        return sentence + "."

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, never wrapped."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class HelpfulCommand(_WithExamples):
    """A command whose help ends with examples."""


class HelpfulGroup(_WithExamples, click.Group):
    """A group whose help ends with examples, and whose commands' help does too."""

    command_class = HelpfulCommand

"""vLLM's own flags on `trimtab serve --engine vllm`: told from ours, and read by vLLM's parser."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import click

from trimtab.ui.help_page import HelpfulCommand

FLAGS = "trimtab.vllm_flags"
"""Where the command's context keeps them."""


class ServeCommand(HelpfulCommand):
    """A command that leaves options it does not know to vLLM, if `--engine vllm` is given.

    Whatever follows such an option belongs to it, up to the next one, so MODEL comes first.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep vLLM's flags in the context's meta, and parse the rest."""
        if not _wants_vllm(args):
            return super().parse_args(ctx, args)
        known = {
            name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)
        }
        ours: list[str] = []
        theirs: list[str] = []
        into = ours
        for arg in args:
            if arg.startswith("-") and not _is_number(arg):
                into = ours if arg.partition("=")[0] in known else theirs
            into.append(arg)
        ctx.meta[FLAGS] = theirs
        return super().parse_args(ctx, ours)


def _wants_vllm(args: list[str]) -> bool:
    return "--engine=vllm" in args or ("--engine", "vllm") in pairwise(args)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def vllm_options(flags: list[str]) -> dict[str, Any]:
    """Return vLLM's engine arguments by name, those only that were given.

    Raises:
        click.UsageError: vLLM does not know a flag, or is not installed.
    """
    if not flags:
        return {}
    try:
        from vllm import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise click.UsageError(f"--engine vllm needs vLLM ({error}): pip install vllm.") from None
    parser = FlexibleArgumentParser(prog="trimtab serve --engine vllm", add_help=False)
    AsyncEngineArgs.add_cli_args(parser)
    parsed = vars(parser.parse_args(flags))
    usual = vars(parser.parse_args([]))
    names = {field.name for field in fields(AsyncEngineArgs)}
    return {
        name: value
        for name, value in parsed.items()
        if name in names and name != "model" and value != usual[name]
    }

"""`trimtab methods`: the ways to build a vector."""

from __future__ import annotations

from dataclasses import asdict

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option
from trimtab.ui.terminal import next_steps, out, out_json, table


@click.command(
    cls=HelpfulCommand,
    examples=(
        "trimtab methods",
        "trimtab methods --json",
    ),
)
@json_option
def methods(as_json: bool) -> None:
    """List the methods that build vectors, with their options and sources."""
    from trimtab.training.vectors import registry

    cards = registry.describe()
    if as_json:
        out_json([{**asdict(card), "is_default": card.name == registry.DEFAULT} for card in cards])
        return
    rows = [
        (
            card.name + (" *" if card.name == registry.DEFAULT else ""),
            " ".join(f"{key}={value}" for key, value in card.options.items()) or "-",
            card.summary,
        )
        for card in cards
    ]
    out(table(("method", "options", "what it takes"), rows))
    out("* the default. --json adds each method's source.")
    next_steps(f"trimtab vectors build --concept optimistic --method {cards[0].name}")

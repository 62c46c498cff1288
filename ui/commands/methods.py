"""`trimtab methods`: the ways to build a vector, and to attribute an answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option
from trimtab.ui.terminal import next_steps, out, out_json, styled, wrapped

if TYPE_CHECKING:
    from trimtab.steering.registry import MethodCard

COMMANDS = {"vector": "trimtab vectors build", "attribution": "trimtab attribute"}


@click.command(
    cls=HelpfulCommand,
    examples=(
        "trimtab methods",
        "trimtab methods --kind attribution",
        "trimtab methods --json",
    ),
)
@click.option("--kind", type=click.Choice(tuple(COMMANDS)), help="Only these.  [default: both]")
@json_option
def methods(kind: str | None, as_json: bool) -> None:
    """List the methods that build vectors and those that attribute, with options and sources."""
    from trimtab.attribution.methods import registry as attribution
    from trimtab.training.vectors import registry as vector

    registries: dict[str, Any] = {"vector": vector, "attribution": attribution}
    shown = {
        name: registry for name, registry in registries.items() if kind is None or kind == name
    }
    if as_json:
        out_json(
            [
                {**asdict(card), "kind": name, "is_default": card.name == registry.DEFAULT}
                for name, registry in shown.items()
                for card in registry.describe()
            ]
        )
        return
    for name, registry in shown.items():
        out(styled(f"{name.capitalize()} methods: {COMMANDS[name]} --method NAME", "bold"))
        for card in registry.describe():
            _print(card, is_default=card.name == registry.DEFAULT)
        out()
    out("* is the default of its kind. --json adds each method's source.")
    tries = {
        "vector": "trimtab vectors build --concept optimistic --method logistic",
        "attribution": 'trimtab attribute "What is the capital of France?" --method kernel_shap',
    }
    next_steps(*(tries[name] for name in shown))


def _print(card: MethodCard, *, is_default: bool) -> None:
    indent = " " * 24
    name = f"  {card.name}{' *' if is_default else ''}"
    out(f"{name:<24}{wrapped(card.summary, indent=indent).lstrip()}")
    options = " ".join(f"{key}={value}" for key, value in card.options.items())
    if options:
        out(styled(wrapped(options, indent=indent), "dim"))

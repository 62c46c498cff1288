"""Options that several commands share, so that each reads the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from trimtab.steering.model.default import DEFAULT_MODEL_ID

Decorator = Callable[[Any], Any]

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead of text."
)
model_option: Decorator = click.option(
    "--model",
    default=DEFAULT_MODEL_ID,
    show_default=True,
    metavar="MODEL",
    help="A local folder, a Hugging Face id, or the default model.",
)
model_argument: Decorator = click.argument("model", default=DEFAULT_MODEL_ID)


def key_values(
    ctx: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    """Return a repeated KEY=VALUE option as a dictionary."""
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (equals and key):
            raise click.BadParameter(f"{text!r} is not KEY=VALUE.")
        if key in options:
            raise click.BadParameter(f"{key!r} is given twice.")
        options[key] = value
    return options


def loading_options(command: Any, *, dtype: str = "auto") -> Any:
    """Add --device and --dtype, the latter with a default."""
    command = click.option(
        "--dtype",
        default=dtype,
        show_default=True,
        metavar="TYPE",
        help="float32, bfloat16, float16 or auto; on a CPU, auto measures which is faster.",
    )(command)
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, mps or auto.",
    )(command)

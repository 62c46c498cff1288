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


def loading_options(command: Any) -> Any:
    """Add --device and --dtype."""
    command = click.option(
        "--dtype",
        default="auto",
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

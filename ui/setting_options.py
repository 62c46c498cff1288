"""Command line options made from the fields of a settings model, so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import annotated_types
import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trimtab.ui.options import Decorator

MIB = 2**20


def setting_options(model: type[BaseModel], *, but: Iterable[str] = ()) -> Decorator:
    """Return a decorator that adds an option for each field.

    A field in `_bytes` becomes an option in MiB (`--max-body-mb`), one in `_s` loses the unit
    (`--request-timeout SECONDS`), a boolean becomes a pair (`--x / --no-x`), a path takes a FILE.

    Args:
        model: the settings.
        but: fields that have options of their own.
    """
    skipped = set(but)

    def decorate(command: Any) -> Any:
        # The last decorator comes first on the help page.
        for name, field in reversed(model.model_fields.items()):
            if name not in skipped:
                command = _option(name, field)(command)
        return command

    return decorate


def settings_given(
    model: type[BaseModel], options: dict[str, Any], *, but: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the fields' values out of a command's options."""
    given = {}
    for name in model.model_fields:
        if name in but:
            continue
        value = options[_parameter(name)]
        given[name] = int(value * MIB) if name.endswith("_bytes") else value
    return given


def _parameter(name: str) -> str:
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes") + "_mb"
    return name.removesuffix("_s")


def _option(name: str, field: FieldInfo) -> Decorator:
    parameter = _parameter(name)
    flag = "--" + parameter.replace("_", "-")
    text = f"{field.description}."
    if field.annotation == Path | None:
        file = click.Path(dir_okay=False, path_type=Path)
        return click.option(flag, parameter, type=file, metavar="FILE", help=text)
    if field.annotation is bool:
        pair = f"{flag}/--no-{parameter.replace('_', '-')}"
        return click.option(pair, parameter, default=field.default, show_default=True, help=text)
    if name.endswith("_bytes"):
        least = _least(field)[0] / MIB
        return click.option(
            flag,
            parameter,
            default=field.default / MIB,
            show_default=True,
            type=click.FloatRange(least),
            help=text.replace(", bytes", ", MiB"),
        )
    least, is_open = _least(field)
    number = (
        click.IntRange(int(least))
        if field.annotation is int
        else click.FloatRange(least, min_open=is_open)
    )
    return click.option(
        flag,
        parameter,
        default=field.default,
        show_default=True,
        type=number,
        metavar="SECONDS" if name.endswith("_s") else None,
        help=text,
    )


def _least(field: FieldInfo) -> tuple[float, bool]:
    """Return a number's lower bound and whether the bound itself is excluded."""
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            return float(rule.ge), False  # type: ignore[arg-type]
        if isinstance(rule, annotated_types.Gt):
            return float(rule.gt), True  # type: ignore[arg-type]
    raise TypeError("a number among the settings has no lower bound")

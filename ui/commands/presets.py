"""`trimtab presets`: steering specs kept under a name, which is then a model name too."""

from __future__ import annotations

import shlex
from typing import Any

import click

from trimtab.ui.help_page import HelpfulGroup
from trimtab.ui.options import json_option, model_option
from trimtab.ui.stores import check_names, model_id, store_of
from trimtab.ui.terminal import next_steps, out, out_json, say, table


@click.group(
    cls=HelpfulGroup,
    examples=(
        'trimtab presets save sunny "1.0 optimistic"',
        "trimtab presets list",
    ),
)
def presets() -> None:
    """Keep a steering spec under a name.

    A preset is also a model name, such as smollm2:sunny, for clients that cannot add a field.
    """


@presets.command("list", examples=("trimtab presets list", "trimtab presets list --json"))
@model_option
@json_option
def list_(model: str, as_json: bool) -> None:
    """List the presets of a model."""
    store = store_of(model)
    found = store.presets()
    if as_json:
        out_json([_entry(model, name, spec) for name, spec in found.items()])
        return
    if not found:
        say(f"No presets for {model_id(model)} yet.")
        next_steps('trimtab presets save NAME "1.0 VECTOR"', "trimtab vectors list")
        return
    rows = [(name, f"{model_id(model)}:{name}", _shown(spec)) for name, spec in found.items()]
    out(table(("preset", "model name", "steering"), rows))
    next_steps(f"trimtab serve {shlex.quote(model)}")


@presets.command(
    "save",
    examples=(
        'trimtab presets save sunny "1.0 optimistic"',
        'trimtab presets save candid \'{"vectors": [{"id": "honest", "scale": 0.8}]}\'',
    ),
)
@click.argument("name")
@click.argument("expression")
@model_option
@click.option("--overwrite", is_flag=True, help="Replace a preset of the same name.")
def save(name: str, expression: str, model: str, overwrite: bool) -> None:
    """Save EXPRESSION, such as "0.8 honest - 0.3 creative" or a JSON spec, under NAME."""
    from trimtab.steering.errors import ArtifactError
    from trimtab.steering.spec import parse_spec
    from trimtab.steering.store import check_id

    store = store_of(model)
    check_id(name)
    spec = parse_spec(expression, path="the expression")
    check_names(store, spec)
    if name in store.presets() and not overwrite:
        raise ArtifactError(f"There is a preset {name!r} already; replace it with --overwrite.")
    store.put_preset(name, spec)
    say(f"Saved {name}: {_shown(spec)}. It is served as the model {model_id(model)}:{name}.")
    next_steps(
        f"trimtab chat {shlex.quote(model)} --preset {name}", f"trimtab serve {shlex.quote(model)}"
    )


@presets.command("show", examples=("trimtab presets show sunny",))
@click.argument("name")
@model_option
@json_option
def show(name: str, model: str, as_json: bool) -> None:
    """Show one preset's spec."""
    spec = store_of(model).preset(name)
    if as_json:
        out_json(_entry(model, name, spec))
        return
    out(f"{name}: {_shown(spec)}")
    next_steps(f"trimtab chat {shlex.quote(model)} --preset {name}")


@presets.command("delete", examples=("trimtab presets delete sunny",))
@click.argument("name")
@model_option
def delete(name: str, model: str) -> None:
    """Delete a preset. The vectors it names stay."""
    store_of(model).delete_preset(name)
    say(f"Deleted the preset {name}.")
    next_steps("trimtab presets list")


def _entry(model: str, name: str, spec: Any) -> dict[str, Any]:
    return {
        "id": name,
        "model": f"{model_id(model)}:{name}",
        "spec": spec.model_dump(mode="json", exclude_defaults=True),
    }


def _shown(spec: Any) -> str:
    """Return the string form where it says everything, else JSON."""
    import json

    dumped = spec.model_dump(mode="json", exclude_defaults=True)
    plain = all(set(term) <= {"id", "scale"} for term in dumped.get("vectors", []))
    if set(dumped) != {"vectors"} or not plain:
        return json.dumps(dumped)
    text = ""
    for term in spec.vectors:
        sign = "-" if term.scale < 0 else "+"
        text += f" {sign} {abs(term.scale):g} {term.id}"
    return text.removeprefix(" + ").strip()

"""`trimtab classifiers export`, `import` and `delete`: classifiers as files."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from trimtab.ui.commands.artifact_files import (
    CLASSIFIER,
    delete_artifact,
    keep,
    model_flag,
    read_file,
)
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import model_option
from trimtab.ui.output_file import check_can_write
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import next_steps, say


@click.command(
    "export",
    cls=HelpfulCommand,
    examples=("trimtab classifiers export tone tone.safetensors",),
)
@click.argument("classifier_id", metavar="ID")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
def export(classifier_id: str, file: Path, model: str, overwrite: bool) -> None:
    """Write a classifier to FILE, a .safetensors file that keeps everything."""
    from trimtab.steering.classifier import to_bytes
    from trimtab.steering.store import write_atomically

    if file.suffix != ".safetensors":
        raise click.UsageError(f"{file.name!r} must end with .safetensors.")
    check_can_write(file, overwrite=overwrite)
    data = to_bytes(store_of(model).classifier(classifier_id))
    write_atomically(file, data)
    say(f"Wrote {classifier_id} to {file} ({len(data) / 1024:.0f} KiB).")
    copy = f"{shlex.quote(str(file))} --id {classifier_id}-copy"
    next_steps(f"trimtab classifiers import {copy}{model_flag(model)}")


@click.command(
    "import",
    cls=HelpfulCommand,
    examples=(
        "trimtab classifiers import tone.safetensors",
        "trimtab classifiers import tone.safetensors --id tone-2",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "classifier_id", help="Its name here.  [default: the file's own]")
@click.option(
    "--model",
    metavar="MODEL",
    help="The model to keep it for.  [default: the one it names]",
)
@click.option("--overwrite", is_flag=True, help="Replace a classifier of the same id.")
def import_(file: Path, classifier_id: str | None, model: str | None, overwrite: bool) -> None:
    """Store a classifier from a trimtab .safetensors file."""
    from trimtab.steering.classifier import from_bytes

    classifier = from_bytes(read_file(CLASSIFIER, file), name=file.name)
    keep(
        CLASSIFIER,
        classifier,
        name=file.name,
        artifact_id=classifier_id,
        model=model,
        overwrite=overwrite,
    )


@click.command(
    "delete",
    cls=HelpfulCommand,
    examples=("trimtab classifiers delete tone --yes",),
)
@click.argument("classifier_id", metavar="ID")
@model_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(classifier_id: str, model: str, yes: bool) -> None:
    """Delete a classifier, or its file if that cannot be read."""
    delete_artifact(CLASSIFIER, classifier_id, model=model, yes=yes)

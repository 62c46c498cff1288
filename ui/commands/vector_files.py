"""`trimtab vectors export`, `import` and `delete`: vectors as files."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from trimtab.ui.commands.artifact_files import VECTOR, delete_artifact, keep, read_file
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import model_option
from trimtab.ui.output_file import check_can_write
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import next_steps, say

SUFFIXES = (".safetensors", ".gguf")


@click.command(
    "export",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors export optimistic optimistic.safetensors",
        "trimtab vectors export optimistic optimistic.gguf",
    ),
)
@click.argument("vector_id", metavar="ID")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
def export(vector_id: str, file: Path, model: str, overwrite: bool) -> None:
    """Write a vector to FILE: .safetensors keeps everything, .gguf is for llama.cpp.

    A GGUF file holds the default layers only, at their calibrated strength.
    """
    from trimtab.steering.store import write_atomically
    from trimtab.steering.vector import to_bytes

    if file.suffix not in SUFFIXES:
        raise click.UsageError(f"{file.name!r} must end with .safetensors or .gguf.")
    check_can_write(file, overwrite=overwrite)
    vector = store_of(model).vector(vector_id)
    if file.suffix == ".gguf":
        from trimtab.steering.gguf import to_gguf

        data = to_gguf(vector)
    else:
        data = to_bytes(vector)
    write_atomically(file, data)
    say(f"Wrote {vector_id} to {file} ({len(data) / 1024:.0f} KiB).")
    if file.suffix == ".gguf":
        say("llama.cpp applies it at its strength 1.0: --control-vector " + shlex.quote(str(file)))
    next_steps(f"trimtab vectors import {shlex.quote(str(file))} --id {vector_id}-copy")


@click.command(
    "import",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors import optimistic.safetensors",
        "trimtab vectors import happy.gguf --id happy --model smollm2",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "vector_id", help="Its name here.  [default: the file's own]")
@click.option(
    "--model",
    metavar="MODEL",
    help="The model to keep it for.  [default: the one it names, or smollm2]",
)
@click.option("--overwrite", is_flag=True, help="Replace a vector of the same id.")
def import_(file: Path, vector_id: str | None, model: str | None, overwrite: bool) -> None:
    """Store a vector from a trimtab .safetensors file or a GGUF control vector."""
    data = read_file(VECTOR, file)
    store_vector(data, name=file.name, vector_id=vector_id, model=model, overwrite=overwrite)


def store_vector(
    data: bytes, *, name: str, vector_id: str | None, model: str | None, overwrite: bool
) -> None:
    """Check a file's bytes and store the vector; say where, and what to try next.

    Args:
        data: the whole file, safetensors or GGUF.
        name: what to call it in errors; its stem is a GGUF vector's id by default.
        vector_id: id here; None takes the file's own.
        model: model to keep it for; None takes the one it names, or the default model.
        overwrite: replace a vector of the same id.

    Raises:
        ArtifactError: not a vector, or the id is taken or not valid.
    """
    from trimtab.steering.store import check_id
    from trimtab.steering.vector import from_bytes

    if data[:4] == b"GGUF":
        from trimtab.steering.gguf import from_gguf

        vector = from_gguf(data, id=check_id(vector_id or Path(name).stem), name=name)
    else:
        vector = from_bytes(data, name=name)
    keep(VECTOR, vector, name=name, artifact_id=vector_id, model=model, overwrite=overwrite)


@click.command(
    "delete",
    cls=HelpfulCommand,
    examples=("trimtab vectors delete optimistic --yes",),
)
@click.argument("vector_id", metavar="ID")
@model_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(vector_id: str, model: str, yes: bool) -> None:
    """Delete a vector, or its file if that cannot be read."""
    delete_artifact(VECTOR, vector_id, model=model, yes=yes)

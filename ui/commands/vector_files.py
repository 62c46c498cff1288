"""`trimtab vectors export`, `import` and `delete`: vectors as files."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from trimtab.steering.errors import ArtifactError, NotFoundError
from trimtab.steering.model.default import DEFAULT_MODEL_ID
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import model_option
from trimtab.ui.output_file import check_can_write
from trimtab.ui.stores import model_id, store_of
from trimtab.ui.terminal import ask_to_confirm, next_steps, say

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
    data = _read(file)
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
    # The id in a file is foreign text: it must not name a place outside the store.
    vector = vector.renamed(check_id(vector_id or vector.id))
    named = vector.model.id if vector.model.fingerprint is not None else ""
    kept_for = model or named or DEFAULT_MODEL_ID
    if model and named and model_id(model) != named:
        raise ArtifactError(
            f"{name} was built for {named!r}, not for {model_id(model)!r}, and would be refused "
            f"there. Leave --model out to keep it for {named!r}."
        )
    store = store_of(kept_for)
    check_is_free(store, vector.id, overwrite=overwrite)
    store.put_vector(vector)
    say(f"Stored {vector.id} for {model_id(kept_for)}: {len(vector.layers)} layers.")
    option = "" if kept_for == DEFAULT_MODEL_ID else f" --model {shlex.quote(kept_for)}"
    next_steps(f"trimtab vectors show {vector.id}{option}")


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
    from trimtab.steering.store import check_id

    check_id(vector_id)
    store = store_of(model)
    if f"vectors/{vector_id}.safetensors" not in store.problems:
        store.vector(vector_id)
    ask_to_confirm(f"Delete the vector {vector_id!r} of {model_id(model)}?", yes=yes)
    store.delete_vector(vector_id)
    say(f"Deleted {vector_id}.")
    next_steps("trimtab vectors list")


def check_is_free(store: object, vector_id: str, *, overwrite: bool) -> None:
    """Refuse an id that is taken, unless it may be replaced.

    Raises:
        ArtifactError: it is taken, or is no valid id.
    """
    from trimtab.steering.store import Store, check_id

    assert isinstance(store, Store)
    check_id(vector_id)
    if overwrite:
        return
    try:
        store.vector(vector_id)
    except NotFoundError:
        if f"vectors/{vector_id}.safetensors" not in store.problems:
            return
    raise ArtifactError(
        f"There is a vector {vector_id!r} already; replace it with --overwrite, or choose another "
        "--id."
    )


def _read(file: Path) -> bytes:
    """Return a file's bytes, never more than an artifact may have."""
    from trimtab.steering.artifact import MAX_ARTIFACT_BYTES

    if not file.is_file():
        raise ArtifactError(f"There is no file {str(file)!r}.")
    with file.open("rb") as opened:
        data = opened.read(MAX_ARTIFACT_BYTES + 1)
    if len(data) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{file.name} is over {MAX_ARTIFACT_BYTES} bytes; no vector is.")
    return data

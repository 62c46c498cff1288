"""`trimtab vectors compare`: how alike vectors are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from trimtab.ui.commands.artifact_files import VECTOR, model_flag, say_problems
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, model_option
from trimtab.ui.stores import model_id, store_of
from trimtab.ui.terminal import next_steps, out, out_json, say, styled, table, width

if TYPE_CHECKING:
    from trimtab.steering.similarity import Matrix
    from trimtab.steering.vector import VectorArtifact

_ROOM = 5  # columns of a cosine: "+0.31"


@click.command(
    "compare",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors compare",
        "trimtab vectors compare optimistic warm formal",
        "trimtab vectors compare optimistic warm --layer 15 --json",
    ),
)
@click.argument("vector_ids", metavar="[ID]...", nargs=-1)
@click.option(
    "--layer",
    type=click.IntRange(0),
    metavar="N",
    help="Compare the rows at this layer.  [default: the mean over the layers that either of the "
    "two steers by default]",
)
@model_option
@json_option
def compare(vector_ids: tuple[str, ...], layer: int | None, model: str, as_json: bool) -> None:
    """Print the cosine similarity of every two vectors: all of a model's, or those named.

    1 is the same direction, -1 the opposite, 0 neither. A `-` stands where two vectors have no
    layer to be compared at.
    """
    from trimtab.steering.similarity import similarities

    found, problems = _vectors(vector_ids, model)
    matrix = similarities(found, layer=layer)
    ids = [vector.id for vector in found]
    if as_json:
        out_json({"ids": ids, "layer": layer, "matrix": matrix})
        return
    if found:
        where = (
            f"at layer {layer}" if layer is not None else "over the layers they steer by default"
        )
        out(f"{styled('Cosine', 'bold')} {where}")
        for block in similarity_tables(ids, matrix):
            out()
            out(block)
    say_problems(problems)
    if not found:
        say(f"No vectors for {model_id(model)} yet.")
        next_steps("trimtab vectors build --concept optimistic")
        return
    next_steps(f"trimtab vectors show {ids[0]}{model_flag(model)}")


def _vectors(ids: tuple[str, ...], model: str) -> tuple[list[VectorArtifact], dict[str, str]]:
    """Return those named, or all there are with the files that cannot be read."""
    if not ids:
        return VECTOR.found(model)
    store = store_of(model)
    return [store.vector(name) for name in ids], {}


def similarity_tables(ids: Sequence[str], matrix: Matrix) -> list[str]:
    """Return a matrix as tables, as many columns in each as the terminal has room for.

    Args:
        ids: of the rows and columns; columns bear the rows' numbers.
        matrix: from `similarities`.
    """
    names = max(map(len, (*ids, "vector"))) + len(str(len(ids))) + 2
    n_columns = max(1, (width() - names) // (_ROOM + 2))
    return [
        table(
            ("", "vector", *(str(i + 1).rjust(_ROOM) for i in block)),
            [
                (number, name, *(_cell(row[i]) for i in block))
                for number, (name, row) in enumerate(zip(ids, matrix, strict=True), start=1)
            ],
        )
        for start in range(0, len(ids), n_columns)
        for block in [range(start, min(start + n_columns, len(ids)))]
    ]


def _cell(cosine: float | None) -> str:
    return ("-" if cosine is None else f"{cosine:+.2f}").rjust(_ROOM)

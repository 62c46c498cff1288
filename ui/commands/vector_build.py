"""`trimtab vectors build` and `concepts`: make a vector from pairs of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.steering.errors import DataError
from trimtab.ui.commands.artifact_files import VECTOR, check_is_free, model_flag
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, key_values, loading_options, model_option
from trimtab.ui.receipt_line import spans
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import next_steps, out, out_json, say, stages, table

if TYPE_CHECKING:
    from trimtab.training.vectors.pairs import PairSet


@click.command(
    "build",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors build --concept optimistic",
        "trimtab vectors build --pairs my_pairs.jsonl --id mine --method pca",
        "trimtab vectors build --concept warm --map",
        'trimtab vectors build --describe "warm and kind" --against "cold and distant" --id warm',
    ),
)
@click.option("--concept", "concept_name", metavar="NAME", help="A bundled data set.")
@click.option(
    "--pairs",
    "pairs_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON lines: {"prompt", "preferred", "dispreferred"} or {"positive", "negative"}.',
)
@click.option("--describe", metavar="WORDS", help="Build from a description alone, with --against.")
@click.option("--against", metavar="WORDS", help="The description of the opposite.")
@click.option("--id", "vector_id", help="Name of the vector.  [default: the concept or file]")
@click.option("--method", metavar="NAME", help="How to find it; see `trimtab methods`.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=key_values,
    help="An option of the method; repeatable.",
)
@click.option(
    "--position",
    default="mean",
    show_default=True,
    help="Tokens of the answer to read: mean, last, or an index.",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    show_default=True,
    help="Measure effect and damage to choose layers and the unit of scale.",
)
@click.option(
    "--map/--no-map",
    "is_mapped",
    default=False,
    show_default=True,
    help="Measure other layers and scales as well, for `show`; more than doubles the time.",
)
@click.option("--description", default="", metavar="TEXT", help="A sentence for people.")
@click.option("--overwrite", is_flag=True, help="Replace a vector of the same id.")
@model_option
@loading_options
def build(
    concept_name: str | None,
    pairs_file: Path | None,
    describe: str | None,
    against: str | None,
    vector_id: str | None,
    method: str | None,
    options: dict[str, str],
    position: str,
    calibrate: bool,
    is_mapped: bool,
    description: str,
    overwrite: bool,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Build a vector from pairs of texts, calibrate it and store it.

    Give one of --concept, --pairs, or --describe with --against.
    """
    sources = [concept_name, pairs_file, describe]
    if sum(source is not None for source in sources) != 1:
        raise click.UsageError("Give one of --concept, --pairs, or --describe with --against.")
    if (describe is None) != (against is None):
        raise click.UsageError("--describe and --against go together.")
    if is_mapped and not calibrate:
        raise click.UsageError(
            "--map shows multiples of the calibrated dose: leave out --no-calibrate."
        )
    name = vector_id or concept_name or (pairs_file.stem if pairs_file else None)
    if name is None:
        raise click.UsageError("A vector built from a description needs a name: give --id.")

    # All that can be refused is refused before the model is loaded.
    store = store_of(model)
    check_is_free(VECTOR, store, name, overwrite=overwrite)
    from trimtab.training.vectors import registry
    from trimtab.training.vectors.activations import parse_position

    method = method or registry.DEFAULT
    registry.make(method, options)
    where = parse_position(position)
    pairs = _pairs(concept_name, pairs_file)

    from trimtab.steering.model.loading import load_model
    from trimtab.steering.model.profile import profile_model
    from trimtab.training.steered_model import SteeredModel
    from trimtab.training.vectors.build import build_vector
    from trimtab.training.vectors.descriptions import pairs_from_descriptions
    from trimtab.ui.server_log import quiet_start

    quiet_start()
    began = time.perf_counter()
    with stages() as stage:
        stage(f"Loading {model}")
        loaded = load_model(model, device=device, dtype=dtype)
        profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
        host = SteeredModel(loaded, profile)
        if pairs is None:
            assert describe is not None  # the only source left
            assert against is not None
            pairs = pairs_from_descriptions(
                host,
                describe,
                against,
                progress=lambda done, total: stage("Writing the pairs", done, total),
            )
        vector = build_vector(
            host,
            pairs,
            id=name,
            method=method,
            options=options,
            position=where,
            is_calibrated=calibrate,
            is_mapped=is_mapped,
            description=description,
            progress=lambda name, done, total: stage(name.capitalize(), done, total),
        )
    store.put_vector(vector)
    seconds = time.perf_counter() - began
    at = spans(vector.default_layers)
    say(f"Built {name} from {len(pairs.pairs)} pairs in {seconds:.0f} s; it steers at {at}.")
    say(f"Time spent: {stage.spent()}.")
    option = model_flag(model)
    next_steps(
        f"trimtab vectors show {name}{option}",
        f'trimtab vectors apply {name} -p "How will my first day at work go?"{option}',
    )


def _pairs(concept_name: str | None, file: Path | None) -> PairSet | None:
    """Return the pairs that are written down, or None if the model has to write them."""
    from trimtab.training.vectors.pairs import concept, read_pairs

    if concept_name is not None:
        return concept(concept_name)
    if file is None:
        return None
    if not file.is_file():
        raise DataError(f"There is no file {str(file)!r}.")
    return read_pairs(file)


@click.command(
    "concepts",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors concepts",
        "trimtab vectors concepts --json",
    ),
)
@json_option
def concepts(as_json: bool) -> None:
    """List the bundled data sets that vectors can be built from."""
    from trimtab.training.bundled_sets import vector_concepts

    found = vector_concepts()
    if as_json:
        out_json(found)
        return
    rows = [(c["id"], c["n_build"], c["n_held"], _start(c["example"]["preferred"])) for c in found]
    out(table(("concept", "build", "held", "a preferred text"), rows))
    next_steps(f"trimtab vectors build --concept {found[0]['id']}")


def _start(text: str) -> str:
    return text if len(text) <= 60 else text[:57].rstrip() + "..."

"""`trimtab vectors list`, `show` and `apply`: what there is, what is known of it, what it does."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from trimtab.ui.client import Client
from trimtab.ui.commands.artifact_files import VECTOR, model_flag, say_problems
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, loading_options, model_option
from trimtab.ui.receipt_line import receipt_line, spans
from trimtab.ui.stores import model_id, store_of
from trimtab.ui.terminal import next_steps, out, out_json, say, styled, table, wrapped

if TYPE_CHECKING:
    from trimtab.steering.vector import VectorArtifact


@click.command(
    "list",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors list",
        "trimtab vectors list --model smollm2 --json",
    ),
)
@click.option("--model", metavar="MODEL", help="Only this model's.  [default: every model's]")
@json_option
def list_(model: str | None, as_json: bool) -> None:
    """List the stored vectors, and the files that cannot be read."""
    found, problems = VECTOR.found(model)
    if as_json:
        out_json({"vectors": [vector.card() for vector in found], "problems": problems})
        return
    if found:
        header = ("vector", "model", "method", "layers", "description")
        out(table(header, [_row(vector) for vector in found]))
    say_problems(problems)
    if not found:
        say(f"No vectors {f'for {model_id(model)} ' if model else ''}yet.")
        next_steps("trimtab vectors build --concept optimistic", "trimtab vectors concepts")
        return
    option = f" --model {shlex.quote(model)}" if model else ""
    next_steps(f"trimtab vectors show {found[0].id}{option}")


def _row(vector: VectorArtifact) -> tuple[str, ...]:
    layers = spans(vector.default_layers).split(" ", 1)[1]
    return vector.id, vector.model.id, vector.method, layers, vector.description


@click.command(
    "show",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors show optimistic",
        "trimtab vectors show optimistic --json",
    ),
)
@click.argument("vector_id", metavar="ID")
@model_option
@json_option
def show(vector_id: str, model: str, as_json: bool) -> None:
    """Show where a vector comes from, and draw its calibration: effect against damage.

    A vector that was built with --map shows other layers and scales as well.
    """
    vector = store_of(model).vector(vector_id)
    card = vector.card()
    if as_json:
        out_json(card)
        return
    out(styled(vector.id, "bold") + (f": {vector.description}" if vector.description else ""))
    for name, value in _facts(vector).items():
        out(f"  {name:<14} {value}")
    if vector.calibration:
        from trimtab.ui.curve_chart import curve_chart

        out()
        out(curve_chart(vector.calibration))
        if "map" in vector.calibration:
            _show_map(vector)
    else:
        say("Not calibrated: scale 1.0 is the direction's raw length.")
    next_steps(_try_it(vector_id, model))


def _show_map(vector: VectorArtifact) -> None:
    from trimtab.ui.map_table import map_table

    assert vector.calibration is not None  # the map is part of it
    try:
        text = map_table(vector.calibration["map"], default=list(vector.default_layers))
    # A calibration is plain JSON that an imported file may fill with anything.
    except (KeyError, TypeError, ValueError, AttributeError):
        say("Its map is not of trimtab's form; --json shows it. Build the vector again with --map.")
        return
    out()
    out(text)


def _facts(vector: VectorArtifact) -> dict[str, str]:
    norms = [float(x) for x in vector.directions.norm(dim=1)]
    width_of = f"width {vector.model.hidden_size}"
    facts = {
        "model": f"{vector.model.id} ({vector.model.model_type}, {width_of})",
        "measured on": vector.model.weights if vector.model.fingerprint else "",
        "method": vector.method,
        "options": ", ".join(f"{k}={v}" for k, v in vector.settings.items()),
        "data": ", ".join(f"{k}={_short(v)}" for k, v in vector.data.items()),
        "steers at": f"{spans(vector.default_layers)} by default",
        "has rows for": spans(vector.layers),
        "row norms": f"{min(norms):.3g} to {max(norms):.3g}",
        "keeps norms": "yes" if vector.normalize else "no",
        "probe": "none" if vector.probe is None else f"reads layer {vector.probe_layer}",
        "created": f"{vector.created} by trimtab {vector.trimtab_version}".strip(),
        "digest": vector.digest[:16],
    }
    return {name: value for name, value in facts.items() if value}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text[:60]


def _try_it(vector_id: str, model: str) -> str:
    question = "How will my first day at work go?"
    return f'trimtab vectors apply {vector_id} -p "{question}"{model_flag(model)}'


@click.command(
    "apply",
    cls=HelpfulCommand,
    examples=(
        'trimtab vectors apply optimistic -p "How will my first day at work go?"',
        'trimtab vectors apply optimistic -p "How was your day?" --scale 0.5 --scale -1 --json',
    ),
)
@click.argument("vector_id", metavar="ID")
@click.option("--prompt", "-p", required=True, help="What to ask the model.")
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    help="Times the calibrated unit; repeatable.  [default: 1 and -1]",
)
@click.option(
    "--max-tokens", default=60, show_default=True, type=click.IntRange(1), help="Longest answer."
)
@click.option("--any-dose", is_flag=True, help="Allow doses that break the model.")
@model_option
@loading_options
@json_option
def apply(
    vector_id: str,
    prompt: str,
    scales: tuple[float, ...],
    max_tokens: int,
    any_dose: bool,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Answer one prompt without the vector, then with it at each scale, likeliest tokens only."""
    from trimtab.ui.local_server import local_server

    # Before the model is loaded: a mistyped id should not cost five seconds.
    store_of(model).vector(vector_id)
    say(f"Loading {model} ...")
    with local_server(model, device=device, dtype=dtype, any_dose=any_dose) as server:
        answers = answered_at(
            Client(server.url),
            server.model,
            vector_id,
            prompt=prompt,
            scales=scales or (1.0, -1.0),
            max_tokens=max_tokens,
        )
    if as_json:
        out_json({"id": vector_id, "prompt": prompt, "answers": answers})
        return
    for answer in answers:
        head = "unsteered" if answer["scale"] is None else f"scale {answer['scale']:+g}"
        receipt = answer["receipt"]
        out(styled(head, "bold") + (f"   {receipt_line(receipt)}" if receipt else ""))
        out(wrapped(answer["text"].strip(), indent="  "))
        out()
    next_steps(
        f'trimtab chat {shlex.quote(model)} --steer "1.0 {vector_id}"',
        f"trimtab serve {shlex.quote(model)}",
    )


def answered_at(
    client: Client,
    model: str,
    vector_id: str,
    *,
    prompt: str,
    scales: tuple[float, ...],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Return the unsteered answer and one for each scale, generated in one batch.

    Returns:
        For each `{"scale": None or number, "text", "receipt": None or the answer's}`.
    """
    from concurrent.futures import ThreadPoolExecutor

    def answer(scale: float | None) -> dict[str, Any]:
        steering = None if scale is None else {"vectors": [{"id": vector_id, "scale": scale}]}
        pieces = list(
            client.chat(
                [{"role": "user", "content": prompt}],
                model=model,
                steering=steering,
                max_tokens=max_tokens,
            )
        )
        receipts = [piece.receipt for piece in pieces if piece.receipt]
        text = "".join(piece.text for piece in pieces)
        return {"scale": scale, "text": text, "receipt": receipts[-1] if receipts else None}

    with ThreadPoolExecutor(max_workers=1 + len(scales)) as pool:
        return list(pool.map(answer, (None, *scales)))

"""`trimtab attribute`: which words of a prompt made the model say this rather than that."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.steering.model.default import DEFAULT_MODEL_ID
from trimtab.ui.attribution_question import MAX_TOKENS, Question, question_of
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option, key_values, loading_options, model_option
from trimtab.ui.output_file import check_can_write
from trimtab.ui.terminal import next_steps, out, out_json, say, stages

if TYPE_CHECKING:
    from trimtab.steering.spec import SteeringSpec

# A test compares it with what there is: the methods' own modules take seconds to import.
BASELINES = ("zero", "pad", "mean", "drop")
OTHERS = ("kernel_shap", "integrated_gradients")  # of different kinds, to compare


@click.command(
    cls=HelpfulCommand,
    examples=(
        'trimtab attribute "What is the capital of France?"',
        'trimtab attribute "What is the capital of France?" --target "Paris." --html paris.html',
        'trimtab attribute "Is the sky blue?" --preferred Yes --dispreferred No --json',
        'trimtab attribute "The capital of France is" --raw --target " Paris" --method ig',
        'trimtab attribute "How will it go?" --steer "1.0 optimistic"',
        'echo "Why is the sky blue?" | trimtab attribute -',
    ),
)
@click.argument("prompt", required=False)
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='A conversation instead of PROMPT: JSON, [{"role", "content"}, ...].',
)
@click.option("--target", metavar="TEXT", help="The answer to explain.")
@click.option("--preferred", metavar="TEXT", help="An answer to explain against --dispreferred.")
@click.option("--dispreferred", metavar="TEXT", help="The answer it is compared with.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help=f"Longest answer, where the model gives it itself.  [default: {MAX_TOKENS}]",
)
@click.option("--raw", is_flag=True, help="Read PROMPT as it stands, without the chat template.")
@click.option("--method", metavar="NAME", help="How to find the scores; see `trimtab methods`.")
@click.option(
    "--set",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=key_values,
    help="An option of the method; repeatable.",
)
@click.option(
    "--baseline",
    default=BASELINES[0],
    show_default=True,
    type=click.Choice(BASELINES),
    help="What stands in for a word that is taken away.",
)
@click.option(
    "--normalize-length",
    is_flag=True,
    help="Divide an answer's log-probability by its number of tokens.",
)
@click.option(
    "--steer",
    "--steering",
    "steer",
    metavar="EXPR",
    help='Ask the model as it is steered, such as by "1.0 optimistic".',
)
@click.option("--any-dose", is_flag=True, help="Allow doses that break the model.")
@click.option(
    "--faithfulness",
    is_flag=True,
    help="Measure the scores too, beside the same scores in random places: about 150 passes.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a page that shows every token's score.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@model_option
@partial(loading_options, dtype="float32")
@json_option
def attribute(
    prompt: str | None,
    messages: Path | None,
    target: str | None,
    preferred: str | None,
    dispreferred: str | None,
    max_tokens: int | None,
    raw: bool,
    method: str | None,
    options: dict[str, str],
    baseline: str,
    normalize_length: bool,
    steer: str | None,
    any_dose: bool,
    faithfulness: bool,
    html: Path | None,
    overwrite: bool,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Show which words of PROMPT made the model give an answer: red spoke for it, blue against.

    Explains --target, or --preferred against --dispreferred, or else the model's own answer. With
    --raw an answer that begins a word begins with a space.
    """
    # All that can be refused is refused before the model is loaded.
    question = question_of(
        prompt,
        messages,
        answers={"target": target, "preferred": preferred, "dispreferred": dispreferred},
        max_tokens=max_tokens,
        is_raw=raw,
        is_normalized=normalize_length,
    )
    if html is not None:
        check_can_write(html, overwrite=overwrite)
    if options and method is None:
        raise click.UsageError("--set is for the method that --method names.")
    if method is not None:
        from trimtab.attribution.methods.registry import make

        make(method, options)
    spec = None if steer is None else _spec(steer, model)

    from trimtab.ui.attributed_model import AttributedModel
    from trimtab.ui.attribution_report import Report
    from trimtab.ui.server_log import quiet_start

    quiet_start()
    with stages() as stage:
        stage(f"Loading {model}")
        asked = AttributedModel(model, device=device, dtype=dtype, spec=spec, any_dose=any_dose)
        tokens = asked.prompt_of(question)
        if question.is_own:
            stage("Answering")
        answers = asked.answers_to(tokens, question)
        result = asked.attribute(
            tokens,
            answers,
            is_normalized=normalize_length,
            method=method,
            options=options,
            baseline=baseline,
            is_measured=faithfulness,
            progress=lambda done, total: stage("Attributing", done, total),
        )
    report = Report(
        result={**result.to_dict(), **asked.receipt},
        answers={name: asked.text_of(ids) for name, ids in answers.items()},
        is_generated=question.is_own,
    )
    if html is not None:
        from trimtab.steering.store import write_atomically
        from trimtab.ui.attribution_page import attribution_page

        write_atomically(html, attribution_page(report).encode())
    if as_json:
        out_json(report.result)
    else:
        from trimtab.ui.attribution_text import attribution_text

        out(attribution_text(report))
    if html is not None:
        say(f"Wrote {html}; open it in a browser.")
    if not as_json:
        tries = _next(question, model=model, method=result.method, steer=steer)
        next_steps(*(tries if html is None else tries[:1]))


def _spec(steer: str, model: str) -> SteeringSpec:
    from trimtab.steering.spec import parse_spec
    from trimtab.ui.stores import check_names, store_of

    spec = parse_spec(steer, path="--steer")
    check_names(store_of(model), spec)
    return spec


def _next(question: Question, *, model: str, method: str, steer: str | None) -> list[str]:
    """Return what to try next: the same question to a method of another kind, and a page."""
    if question.words is None:
        return ["trimtab methods --kind attribution", "trimtab attribute --help"]
    option = "" if model == DEFAULT_MODEL_ID else f" --model {shlex.quote(model)}"
    option += "" if steer is None else f" --steer {shlex.quote(steer)}"
    other = next(name for name in OTHERS if name != method)
    return [
        f"trimtab attribute {question.words}{option} --method {other}",
        f"trimtab attribute {question.words}{option} --html attribution.html",
    ]

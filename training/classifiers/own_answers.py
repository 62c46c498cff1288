"""The model's own answers under instructions, as texts of the instructions' labels.

A steered request has no instruction in its prompt: the state a classifier meets there is that of an
answer behind the bare question. So the answers are given under the instruction and read without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from trimtab.training.classifiers.examples import ExampleSet, tokens_of
from trimtab.training.scoring import end_tokens, generate
from trimtab.training.steered_model import SteeredModel


def own_answers(
    host: SteeredModel,
    data: ExampleSet,
    *,
    n_tokens: int = 48,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Return examples whose prompts are the bare questions and whose answers the model gave.

    Args:
        host: the model, unsteered.
        data: prompts without an answer, whose group is the question without its instruction.
        n_tokens: longest answer; greedy.
        progress: told of the prompts answered.

    Returns:
        The examples with labels, groups and split as they were. Empty answers are left out and
        counted.

    Raises:
        DataError: a prompt and its answer do not fit into the model's context.
    """
    longest = host.profile.max_context - n_tokens
    prompts = [tokens_of(host.tokenizer, e, max_context=longest).ids for e in data.examples]
    ends = end_tokens(host)
    made, empty = [], 0
    generations = generate(host, prompts, n_tokens, progress=progress)
    for example, generation in zip(data.examples, generations, strict=True):
        ids = [token for token in generation.ids if token not in ends]
        text = host.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not text:
            empty += 1
            continue
        made.append(replace(example, prompt=(("user", example.group),), answer=text))
    skipped = Counter(data.skipped)
    if empty:
        skipped["an empty answer"] += empty
    return ExampleSet(f"{data.name}, answered", tuple(made), dict(skipped))

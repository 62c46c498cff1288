"""Pairs from two short descriptions: the model answers neutral questions under each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.steering.errors import DataError
from trimtab.training.scoring import generate
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.neutral import neutral_questions
from trimtab.training.vectors.pairs import Pair, PairSet

MAX_DESCRIPTION = 200
_N_TOKENS = 32


def pairs_from_descriptions(
    host: SteeredModel,
    preferred: str,
    dispreferred: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PairSet:
    """Let the model write the pairs: each neutral question answered under both descriptions.

    The description goes before the question; the pair keeps the plain question, so that the
    direction is of the answers and not of the instruction. Pairs that come out equal or empty are
    dropped and counted (`n_dropped`).

    Args:
        host: the model, with a chat template.
        preferred: what to be, such as "warm and encouraging".
        dispreferred: the opposite.
        progress: told of answers done and in all.

    Raises:
        DataError: descriptions empty, equal or too long; or too few distinct pairs.
    """
    check_descriptions(host.tokenizer, preferred, dispreferred)
    questions = [(q, False) for q in neutral_questions()]
    questions += [(q, True) for q in neutral_questions(split="held")]
    styles = (preferred, dispreferred)
    prompts = [_prompt(host.tokenizer, style, q) for q, _ in questions for style in styles]
    texts = [
        host.tokenizer.decode(text.ids, skip_special_tokens=True).strip()
        for text in generate(host, prompts, _N_TOKENS, progress=progress)
    ]
    pairs = [
        Pair(question, one, other, is_held)
        for (question, is_held), one, other in zip(questions, texts[0::2], texts[1::2], strict=True)
        if one and other and one != other
    ]
    n_dropped = len(questions) - len(pairs)
    if n_dropped > len(questions) // 2:
        raise DataError(
            f"{n_dropped} of {len(questions)} questions got equal or empty answers under "
            f"{preferred!r} and {dispreferred!r}: this model does not tell the two apart."
        )
    return PairSet(f"{preferred} against {dispreferred}", tuple(pairs), n_dropped)


def check_descriptions(tokenizer: Any, preferred: str, dispreferred: str) -> None:
    """Refuse descriptions, or a model, that no pairs can come from.

    Raises:
        DataError: one is empty or too long, both are equal, or the model has no chat template.
    """
    for param, text in (("describe", preferred), ("against", dispreferred)):
        if not text.strip() or len(text) > MAX_DESCRIPTION:
            raise DataError(
                f"A description needs 1 to {MAX_DESCRIPTION} characters, got {text[:40]!r}.",
                param=param,
            )
    if preferred.strip() == dispreferred.strip():
        raise DataError(
            "The two descriptions are the same; nothing can be told apart.", param="against"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "Building from descriptions needs a model with a chat template.", param="describe"
        )


def _prompt(tokenizer: Any, style: str, question: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"Answer in a way that is {style}.\n{question}"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    return ids

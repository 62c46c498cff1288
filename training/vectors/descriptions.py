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
    direction is of the answers and not of the instruction. Pairs that come out equal are dropped.

    Args:
        host: the model, with a chat template.
        preferred: what to be, such as "warm and encouraging".
        dispreferred: the opposite.
        progress: told of questions done and in all.

    Raises:
        DataError: descriptions empty, equal or too long; or too few distinct pairs.
    """
    for text in (preferred, dispreferred):
        if not text.strip() or len(text) > MAX_DESCRIPTION:
            raise DataError(
                f"A description needs 1 to {MAX_DESCRIPTION} characters, got {text[:40]!r}."
            )
    if preferred.strip() == dispreferred.strip():
        raise DataError("The two descriptions are the same; nothing can be told apart.")
    questions = [(q, False) for q in neutral_questions()]
    questions += [(q, True) for q in neutral_questions(split="held")]
    pairs, n_equal = [], 0
    for i, (question, is_held) in enumerate(questions):
        one, other = (_answer(host, style, question) for style in (preferred, dispreferred))
        if one and other and one != other:
            pairs.append(Pair(question, one, other, is_held))
        else:
            n_equal += 1
        if progress is not None:
            progress(i + 1, len(questions))
    if len(pairs) < len(questions) // 2:
        raise DataError(
            f"{n_equal} of {len(questions)} questions got equal or empty answers under "
            f"{preferred!r} and {dispreferred!r}: this model does not tell the two apart."
        )
    return PairSet(f"{preferred} against {dispreferred}", tuple(pairs))


def _answer(host: SteeredModel, style: str, question: str) -> str:
    tokenizer: Any = host.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("Building from descriptions needs a model with a chat template.")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"Answer in a way that is {style}.\n{question}"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    (text,) = generate(host, [prompt], _N_TOKENS)
    decoded: str = tokenizer.decode(text.ids, skip_special_tokens=True)
    return decoded.strip()

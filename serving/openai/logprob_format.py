"""Log-probabilities in the three shapes clients know: chat, legacy completions, vLLM's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai.types.chat.chat_completion_token_logprob import (
    ChatCompletionTokenLogprob,
    TopLogprob,
)
from openai.types.completion_choice import Logprobs

from trimtab.serving.engines.base import EngineError, Logprob, TokenLogprobs

# OpenAI's word for "very unlikely"; JSON has no minus infinity.
_LEAST = -9999.0


def value_of(logprob: Logprob) -> float:
    """Return the log-probability as JSON can hold it.

    Raises:
        EngineError: it is NaN, which means the model's output is broken.
    """
    if logprob.logprob != logprob.logprob:
        raise EngineError("The model's output is not a number; lower the steering's scale.")
    return max(logprob.logprob, _LEAST)


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> list[ChatCompletionTokenLogprob]:
    """Return OpenAI's chat shape, one entry a token."""
    return [
        ChatCompletionTokenLogprob(
            token=one.chosen.token,
            bytes=_bytes(one.chosen.token),
            logprob=value_of(one.chosen),
            top_logprobs=[
                TopLogprob(token=top.token, bytes=_bytes(top.token), logprob=value_of(top))
                for top in one.top
            ],
        )
        for one in tokens
    ]


def completion_logprobs(
    tokens: Sequence[TokenLogprobs | None],
    *,
    first_text: str,
    special_ids: frozenset[int],
    offset: int,
    top: int,
) -> tuple[Logprobs, int]:
    """Return the legacy shape, parallel lists, and the offset after the last token.

    Args:
        tokens: one a token; None where nothing predicts it (the first of an echoed prompt).
        first_text: text of the token that is None.
        special_ids: tokens that take no room in the text.
        offset: characters of the text before the first token.
        top: alternatives asked for; the chosen token is listed besides, as vLLM does.
    """
    texts = [first_text if one is None else one.chosen.token for one in tokens]
    offsets = []
    for one, text in zip(tokens, texts, strict=True):
        offsets.append(offset)
        if one is None or one.chosen.token_id not in special_ids:
            offset += len(text)
    # Any, because the first entry may be null: OpenAI's own type denies it, its API sends it.
    values: Any = [None if one is None else value_of(one.chosen) for one in tokens]
    tops: Any = [
        None if one is None else {x.token: value_of(x) for x in (*one.top[:top], one.chosen)}
        for one in tokens
    ]
    shape = Logprobs.model_construct(
        text_offset=offsets, token_logprobs=values, tokens=texts, top_logprobs=tops
    )
    return shape, offset


def prompt_logprobs(
    tokens: Sequence[TokenLogprobs | None], *, top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's shape: null, then token id -> logprob, rank and text, one entry a token."""
    return [
        None
        if one is None
        else {
            str(x.token_id): {"logprob": value_of(x), "rank": x.rank, "decoded_token": x.token}
            for x in (one.chosen, *one.top[:top])
        }
        for one in tokens
    ]


def _bytes(token: str) -> list[int] | None:
    # A token that is part of a character decodes to the replacement mark, whose bytes are not
    # the token's.
    return None if "�" in token else list(token.encode("utf-8"))

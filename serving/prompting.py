"""From messages or text to token ids, with the model's own tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from trimtab.serving.engines.base import ContextLengthError
from trimtab.serving.errors import RequestError
from trimtab.serving.openai.chat_request import Message


def chat_ids(tokenizer: Any, messages: Sequence[Message], *, max_context: int) -> tuple[int, ...]:
    """Return the ids of a conversation by the model's chat template.

    `developer` becomes `system`. A last message of the assistant's is left open, so that the
    answer goes on where it ends. Takes long for long texts: call it in a thread.

    Raises:
        RequestError: no template, or the template refuses these messages.
        ContextLengthError: the text cannot fit into the context, whatever its tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "This model has no chat template; send plain text to /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    turns = turns_of(messages)
    goes_on = turns[-1]["role"] == "assistant"
    if goes_on and not turns[-1]["content"].strip():
        param = f"messages[{len(turns) - 1}].content"
        raise RequestError(f"{param} is empty, there is nothing to continue.", param=param)
    n_characters = sum(len(turn["content"]) for turn in turns)
    _check_length(tokenizer, n_characters, max_context=max_context, param="messages")
    try:
        ids = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=False,
        )
    # Templates are programs: beside Jinja's own errors they end in Python's usual ones.
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise RequestError(
            f"The model's chat template refuses these messages: {str(error)[:300]}.",
            param="messages",
            code="template_error",
        ) from error
    return _not_empty(ids, param="messages")


def check_number(messages: Sequence[Message], *, most: int) -> None:
    """Refuse more messages than a server takes.

    Raises:
        RequestError: with their number and the limit.
    """
    if len(messages) > most:
        raise RequestError(
            f"messages has {len(messages)} messages; this server allows {most}.", param="messages"
        )


def turns_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as chat templates take them."""
    return [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages
    ]


def text_ids(tokenizer: Any, text: str, *, max_context: int, param: str) -> tuple[int, ...]:
    """Return the ids of a plain prompt, with the tokens the tokenizer adds (such as BOS).

    Takes long for long texts: call it in a thread.

    Raises:
        RequestError: the text makes no token.
        ContextLengthError: the text cannot fit into the context, whatever its tokens.
    """
    _check_length(tokenizer, len(text), max_context=max_context, param=param)
    return _not_empty(tokenizer(text, add_special_tokens=True)["input_ids"], param=param)


def _check_length(tokenizer: Any, n_characters: int, *, max_context: int, param: str) -> None:
    """Refuse at once what would take seconds to cut into tokens that are then too many."""
    longest = _longest_token(tokenizer)
    if n_characters > max_context * longest:
        raise ContextLengthError(
            f"{param} has {n_characters} characters, at least {n_characters // longest} tokens; "
            f"the context holds {max_context}.",
            param=param,
        )


@lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    """Return the characters of the longest token; none stands for more text than that."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)


def _not_empty(ids: Sequence[int], *, param: str) -> tuple[int, ...]:
    if not ids:
        raise RequestError(f"{param} is empty; a model needs at least one token.", param=param)
    return tuple(ids)

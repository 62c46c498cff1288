"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, WithJsonSchema, model_validator

from trimtab.serving.errors import RequestError
from trimtab.serving.openai.generation_request import GenerationRequest, Top, check_token

EXAMPLES: dict[str, Any] = {
    "steered": {
        "summary": "Steered",
        "value": {
            "model": "MODEL",
            "prompt": "The weather today is",
            "max_tokens": 20,
            "steering": "1.0 optimistic",
        },
    },
    "scoring": {
        "summary": "Score a text, generate nothing",
        "value": {
            "model": "MODEL",
            "prompt": "Paris is the capital of France.",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        },
    },
}

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
    ]
}


class CompletionRequest(GenerationRequest):
    """A text to continue."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: int | None = Field(16, ge=0, le=2**31)
    echo: bool = Field(False, description="Put the prompt before the answer")
    logprobs: Top | None = Field(None, description="Alternatives to report with each token")

    @model_validator(mode="after")
    def _completion_agrees(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens 0 needs echo or prompt_logprobs (scoring only).", param="max_tokens"
            )
        return self

    @property
    def wanted_tokens(self) -> int:
        """The most tokens to generate."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """Alternatives to compute for the prompt's tokens; None for none.

        An echo with logprobs shows the prompt's too, and scoring alone is asked of the engine as
        prompt_logprobs.
        """
        echoed = self.logprobs if self.echo else None
        if echoed is None and self.prompt_logprobs is None:
            return 0 if self.max_tokens == 0 else None
        return max(echoed or 0, self.prompt_logprobs or 0)


def read_prompts(
    prompt: Any, *, max_prompts: int, vocab_size: int
) -> list[tuple[str, str | tuple[int, ...]]]:
    """Return the prompts of a request, each with its JSON path: texts, or token ids.

    Raises:
        RequestError: neither of OpenAI's four forms, an empty one, too many, an id out of range.
    """
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids, or a list of such "
            "lists, and not empty.",
            param="prompt",
        )
    if _is_id(prompt[0]):
        return [("prompt", _ids(prompt, vocab_size=vocab_size, path="prompt"))]
    if len(prompt) > max_prompts:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; this server allows {max_prompts}.",
            param="prompt",
        )
    read: list[tuple[str, str | tuple[int, ...]]] = []
    for i, one in enumerate(prompt):
        path = f"prompt[{i}]"
        if type(one) is not type(prompt[0]) or not isinstance(one, str | list):
            raise RequestError(
                f"{path} must be {'a string' if isinstance(prompt[0], str) else 'a list of ids'}, "
                "as the first prompt is.",
                param=path,
            )
        ids_or_text = one if isinstance(one, str) else _ids(one, vocab_size=vocab_size, path=path)
        read.append((path, ids_or_text))
    return read


def _ids(values: list[Any], *, vocab_size: int, path: str) -> tuple[int, ...]:
    if not values:
        raise RequestError(f"{path} is an empty list of token ids.", param=path)
    for i, value in enumerate(values):
        if not _is_id(value):
            raise RequestError(f"{path}[{i}] is not a token id.", param=f"{path}[{i}]")
        check_token(value, vocab_size=vocab_size, param=f"{path}[{i}]")
    return tuple(values)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

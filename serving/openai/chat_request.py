"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from trimtab.serving.errors import RequestError
from trimtab.serving.openai.attribution_options import AttributionOptions
from trimtab.serving.openai.generation_request import GenerationRequest, StrictModel, Top

EXAMPLES: dict[str, Any] = {
    "steered": {
        "summary": "Steered",
        "value": {
            "model": "MODEL",
            "messages": [{"role": "user", "content": "How was your day?"}],
            "max_tokens": 60,
            "temperature": 0,
            "steering": {"vectors": [{"id": "optimistic", "scale": 1.0}]},
        },
    },
    "short": {
        "summary": "Steered by a string, streamed",
        "value": {
            "model": "MODEL",
            "messages": [{"role": "user", "content": "How was your day?"}],
            "stream": True,
            "steering": "0.8 honest - 0.3 formal",
        },
    },
    "plain": {
        "summary": "Not steered",
        "value": {"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}]},
    },
}

# Known to OpenAI's API inside a message, and not to trimtab.
_REFUSED_IN_MESSAGE = (
    "annotations",
    "audio",
    "function_call",
    "name",
    "reasoning_content",
    "refusal",
    "tool_call_id",
    "tool_calls",
)
_REFUSED_PARTS = ("image_url", "input_audio", "file", "refusal", "video_url", "audio_url", "image")


class TextPart(StrictModel):
    """One piece of a message."""

    type: Literal["text"]
    text: str


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}},
    ]
}


class Message(StrictModel):
    """One turn. A content list's texts are joined by line feeds, as vLLM does."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], WithJsonSchema(_CONTENT_SCHEMA)]

    @model_validator(mode="before")
    @classmethod
    def _text_is_one_part(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return {**value, "content": [{"type": "text", "text": value["content"]}]}
        return value

    @property
    def text(self) -> str:
        """The whole content."""
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """A conversation to answer."""

    messages: list[Message] = Field(
        min_length=1,
        description="A last message of the assistant's is continued where it ends",
    )
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: bool = False
    top_logprobs: Top | None = None
    attribution: AttributionOptions | None = Field(
        None, description="Return with each choice what each prompt token did for it"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_refused(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_messages(value.get("messages"))
        return value

    @model_validator(mode="after")
    def _chat_agrees(self) -> Self:
        one, other = self.max_tokens, self.max_completion_tokens
        if one is not None and other is not None and one != other:
            raise RequestError(
                f"max_tokens is {one} and max_completion_tokens {other}; give one of them.",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs true.", param="top_logprobs")
        if self.wanted_tokens == 0 and self.prompt_logprobs is None:
            param = "max_tokens" if one is not None else "max_completion_tokens"
            raise RequestError(f"{param} 0 needs prompt_logprobs (scoring only).", param=param)
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate, by either name; None if the client set none."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


def check_messages(messages: Any) -> None:
    """Refuse by name what OpenAI's messages may hold and trimtab does not read.

    Raises:
        RequestError: naming the first field.
    """
    if isinstance(messages, list):
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                _refuse_in_message(message, path=f"messages[{i}]")


def _refuse_in_message(message: dict[str, Any], *, path: str) -> None:
    for name in _REFUSED_IN_MESSAGE:
        if message.get(name) not in (None, []):
            raise RequestError(
                f"trimtab does not support {path}.{name}; leave it out.",
                param=f"{path}.{name}",
                code="unsupported_field",
            )
        message.pop(name, None)
    if message.get("role") in ("tool", "function"):
        raise RequestError(
            f"trimtab does not support tools, so {path}.role cannot be {message['role']!r}.",
            param=f"{path}.role",
            code="unsupported_field",
        )
    parts = message.get("content")
    for j, part in enumerate(parts if isinstance(parts, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _REFUSED_PARTS:
            raise RequestError(
                f"trimtab does not support {path}.content[{j}] of type {kind!r}; this server "
                "reads text only.",
                param=f"{path}.content[{j}].type",
                code="unsupported_field",
            )

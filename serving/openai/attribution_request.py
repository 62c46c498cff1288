"""The body of POST /v1/attributions."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trimtab.serving.errors import RequestError
from trimtab.serving.openai.attribution_options import Answer, AttributionOptions
from trimtab.serving.openai.chat_request import Message, check_messages
from trimtab.serving.openai.generation_request import Label, Steering
from trimtab.serving.openai.request_metadata import Metadata

EXAMPLES: dict[str, Any] = {
    "contrast": {
        "summary": "Why this answer rather than that one",
        "value": {
            "model": "MODEL",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "preferred": "Paris.",
            "dispreferred": "Lyon.",
        },
    },
    "own": {
        "summary": "Why the model answers what it answers, steered",
        "value": {
            "model": "MODEL",
            "messages": [{"role": "user", "content": "How was your day?"}],
            "max_tokens": 24,
            "steering": "optimistic",
        },
    },
    "mask_fit": {
        "summary": "A method without gradients, with progress",
        "value": {
            "model": "MODEL",
            "prompt": "The capital of France is",
            "target": " Paris",
            "method": "kernel_shap",
            "params": {"samples": 64},
            "stream": True,
        },
    },
}


class AttributionRequest(AttributionOptions):
    """A prompt, and the answer or the two answers in question."""

    model: str = Field(description="The served model, or `<model>:<preset>`", max_length=1024)
    messages: list[Message] | None = Field(None, min_length=1)
    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Plain text instead of messages"
    )
    target: Answer | None = Field(
        None, description="The answer to explain; left out, the model's own greedy answer"
    )
    preferred: Answer | None = Field(None, description="The same as `target`")
    dispreferred: Answer | None = Field(None, description="The same as `contrast`")
    max_tokens: int = Field(64, ge=1, le=1024, description="Longest answer of the model's own")
    stream: bool = Field(False, description="Send progress as events, the result as the last")
    steering: Steering = None
    user: Label = None
    metadata: Metadata | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_refused(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_messages(value.get("messages"))
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("Give either messages or prompt.", param="messages")
        for one, other in (("target", "preferred"), ("contrast", "dispreferred")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise RequestError(f"{one} and {other} say the same; give one.", param=other)
        if self.max_tokens != 64 and self.answer is not None:
            raise RequestError(
                "max_tokens is for the model's own answer; leave it out beside a target.",
                param="max_tokens",
            )
        return self

    @property
    def answer(self) -> str | None:
        """The answer to explain, by either name."""
        return self.target if self.target is not None else self.preferred

    @property
    def other(self) -> str | None:
        """The answer it is compared with, by either name."""
        return self.contrast if self.contrast is not None else self.dispreferred

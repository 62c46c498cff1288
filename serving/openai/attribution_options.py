"""How to attribute, as a request says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab.serving.openai.generation_request import Finite, StrictModel

MAX_TARGET_CHARS = 100_000

Baseline = Literal["zero", "pad", "mean", "drop"]
Params = dict[str, bool | int | Finite | Annotated[str, Field(max_length=200)]]
Answer = Annotated[str, Field(min_length=1, max_length=MAX_TARGET_CHARS)]


class AttributionOptions(StrictModel):
    """How to attribute; the `attribution` field of a chat request."""

    method: str | None = Field(
        None, max_length=64, description="A name of GET /v1/attributions/methods; null: the default"
    )
    params: Params = Field({}, max_length=32, description="The method's options by name")
    baseline: Baseline = Field("zero", description="What stands in for a token taken away")
    length_normalized: bool = Field(
        False, description="Divide each answer's log-probability by its number of tokens"
    )
    faithfulness: bool = Field(
        False, description="Measure the scores too, beside the same scores in random places"
    )
    contrast: Answer | None = Field(
        None, description="Another answer: explain why the model says its own rather than this"
    )

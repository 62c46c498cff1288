"""The fields that chat and text completions share, and how a bad one is reported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from trimtab.serving.errors import RequestError
from trimtab.serving.openai.request_metadata import Metadata
from trimtab.serving.openai.unsupported import LABELS, refuse_unsupported
from trimtab.serving.sampling import MAX_LOGPROBS, SamplingParams
from trimtab.steering.errors import did_you_mean, listed
from trimtab.steering.spec import ArtifactId, json_path

MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_PROBES = 8

Finite = Annotated[float, Field(allow_inf_nan=False)]
Top = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Label = SkipJsonSchema[Any]
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
STEERING_SCHEMA: dict[str, Any] = {
    "description": 'An object, or a string such as "0.8 honest - tone/casual"',
    "anyOf": [{"$ref": "#/components/schemas/SteeringSpec"}, {"type": "string"}],
}
Steering = Annotated[Any, WithJsonSchema(STEERING_SCHEMA)]

Request = TypeVar("Request", bound="StrictModel")


class StrictModel(BaseModel):
    """Takes JSON's own types only, and no field it does not know; null means absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: part for key, part in value.items() if part is not None}


class StreamOptions(StrictModel):
    """How a stream is sent."""

    include_usage: bool = Field(False, description="Send a last chunk with the token counts")
    include_obfuscation: bool = Field(False, description="Only false: chunks are not padded")


class GenerationRequest(StrictModel):
    """What both completion routes honour."""

    model: str = Field(description="The served model, or `<model>:<preset>`", max_length=1024)
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    temperature: Finite = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31, description="0 and -1 keep all")
    min_p: Finite = Field(0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(1.0, ge=0.1, le=10)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Seed | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_BIASES, description="Token id -> value added to its logit"
    )
    stop: Annotated[list[StopString], WithJsonSchema(_STOP_SCHEMA)] = []
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: Top | None = None
    steering: Steering = None
    probes: list[ArtifactId] = Field(
        [],
        max_length=MAX_PROBES,
        description="Classifiers and vectors to read at every generated token",
    )
    vllm_xargs: dict[str, Any] | None = Field(
        None, description='`{"steering": "<json>"}`, another way in'
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Requests share cached prompts only with those that have the same salt",
    )
    # Labels of the sender's: kept off the schema, without effect on the answer.
    user: Label = None
    metadata: Metadata | None = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None

    @model_validator(mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stop"), str):
            return {**value, "stop": [value["stop"]]}
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream true.", param="stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            param = "stream_options.include_obfuscation"
            raise RequestError(f"trimtab does not support {param}; leave it out.", param=param)
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs comes with the whole answer only; leave `stream` out.",
                param="prompt_logprobs",
            )
        return self

    def within(self, *, max_n: int, max_stop: int, vocab_size: int) -> None:
        """Check what depends on the server and its model.

        Raises:
            RequestError: too many choices or stop strings, or a token id out of range.
        """
        if self.n > max_n:
            raise RequestError(f"n is {self.n}; this server allows {max_n}.", param="n")
        if len(self.stop) > max_stop:
            raise RequestError(
                f"stop has {len(self.stop)} strings; this server allows {max_stop}.", param="stop"
            )
        for i, name in enumerate(self.probes):
            if name in self.probes[:i]:
                raise RequestError(f"probes names {name!r} twice.", param=f"probes[{i}]")
        for i, token in enumerate(self.stop_token_ids):
            check_token(token, vocab_size=vocab_size, param=f"stop_token_ids[{i}]")
        self._biases(vocab_size)

    def _biases(self, vocab_size: int) -> dict[int, float]:
        biases = {}
        for key, value in self.logit_bias.items():
            param = f"logit_bias.{key[:40]}"
            # Only the canonical spelling, or "7" and "07" would be one token with two biases.
            if not (key.isascii() and key.isdigit() and str(int(key[:12])) == key):
                raise RequestError(f"{param}: the key must be a token id.", param=param)
            check_token(int(key), vocab_size=vocab_size, param=param)
            biases[int(key)] = value
        return biases

    def sampling(
        self,
        *,
        max_tokens: int,
        choice: int,
        vocab_size: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """Return the sampling of one choice; choice i of a seeded request has seed + i."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else wrap_seed(self.seed + choice),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self._biases(vocab_size),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def read_request(model: type[Request], body: dict[str, Any]) -> Request:
    """Return the validated request of a route.

    Raises:
        RequestError: the first field at fault, its JSON path in `param`.
    """
    honoured = frozenset(model.model_fields)
    body = refuse_unsupported(body, honoured=honoured)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise refused(error, known=honoured - set(LABELS)) from None


def refused(error: ValidationError, *, known: Iterable[str]) -> RequestError:
    """Return pydantic's first complaint as one of ours."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = json_path(first["loc"], root="")
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) > 1:
            return RequestError(f"{param} is not a known field.", param=param, code="unknown_field")
        return RequestError(
            f"{param[:80]} is not a known field.{did_you_mean(param[:80], known)} "
            f"Known: {listed(known, most=40)}.",
            param=param[:80],
            code="unknown_field",
        )
    if first["type"] == "missing":
        return RequestError(f"{param} is missing.", param=param, code="missing_field")
    got = ""
    if isinstance(first["input"], str | int | float) and len(shown := repr(first["input"])) <= 80:
        got = f" (got {shown})"
    reason = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{param or 'The body'}: {reason}{got}.", param=param or None)


def check_token(token: int, *, vocab_size: int, param: str) -> None:
    """Refuse an id the tokenizer does not have.

    Raises:
        RequestError: with the given path.
    """
    if not 0 <= token < vocab_size:
        raise RequestError(
            f"{param} is {str(token)[:40]}; token ids run from 0 to {vocab_size - 1}.", param=param
        )


def wrap_seed(seed: int) -> int:
    """Return the seed as a signed 64-bit number, so that seed + i never leaves the range."""
    return (seed + 2**63) % 2**64 - 2**63

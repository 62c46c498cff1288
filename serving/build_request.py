"""The body of POST /v1/steering/builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema

from trimtab.serving.build_schema import PAIRS, TEXTS
from trimtab.serving.errors import RequestError
from trimtab.serving.openai.generation_request import Seed, StrictModel, refused
from trimtab.steering.errors import did_you_mean, listed
from trimtab.steering.spec import ArtifactId

MAX_DESCRIPTION = 1000

_PAIR_FIELDS = ("prompt", "preferred", "dispreferred", "split")
_CONTRAST_FIELDS = ("positive", "negative", "split")
_TEXT_FIELDS = ("text", "label", "labels", "prompt", "split")

Name = Annotated[str, Field(min_length=1, max_length=64)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]


def _option(value: Any) -> Any:
    if isinstance(value, int | float) and abs(value) <= 2**63:
        return value
    if isinstance(value, str) and len(value) <= 200:
        return value
    raise ValueError("must be a boolean, a number or a text of at most 200 characters")


def _place(value: Any) -> Any:
    if isinstance(value, str) and len(value) <= 16:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1_000_000:
        return value
    raise ValueError("must be 'mean', 'last' or an index into the answer")


# Not unions: pydantic would put the name of a member into the path of an error.
Option = Annotated[
    Any,
    AfterValidator(_option),
    WithJsonSchema({"anyOf": [{"type": kind} for kind in ("boolean", "number", "string")]}),
]
Place = Annotated[
    Any,
    AfterValidator(_place),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]}),
]


class BuildRequest(StrictModel):
    """What the builds of vectors and of classifiers share."""

    id: ArtifactId
    calibrate: bool = Field(
        True, description="Measure how far it may steer; takes most of the time"
    )
    description: str = Field("", max_length=MAX_DESCRIPTION, description="A sentence for people")
    overwrite: bool = Field(False, description="Replace one of the same id, once it is built")


class VectorBuildRequest(BuildRequest):
    """A vector to build, and what from."""

    kind: Literal["vector"]
    concept: Name | None = Field(None, description="A bundled set of pairs")
    pairs: Annotated[list[Any], WithJsonSchema(PAIRS)] | None = None
    describe: Text | None = Field(None, description="What to be, in a few words")
    against: Text | None = Field(None, description="The opposite; goes with `describe`")
    method: str | None = Field(
        None, max_length=64, description="A name of GET /v1/steering/methods; null: the default"
    )
    params: dict[str, Option] = Field({}, max_length=32, description="The method's options by name")
    position: Place = Field(
        "mean", description="Tokens of the answer to read: `mean`, `last`, or an index"
    )
    map: bool = Field(
        False, description="Measure other layers and scales as well; goes with `calibrate`"
    )
    normalize: bool = Field(False, description="Whether steering keeps the hidden norm by default")


class ClassifierBuildRequest(BuildRequest):
    """A classifier to train, and what from."""

    kind: Literal["classifier"]
    bundled: Name | None = Field(None, description="A bundled set of instructions and questions")
    texts: Annotated[list[Any], WithJsonSchema(TEXTS)] | None = None
    network: Literal["mlp", "linear"] = Field("mlp", description="Two hidden layers, or none")
    hidden: int = Field(128, ge=1, le=1024, description="Units of each hidden layer")
    layers: list[int] | None = Field(
        None, min_length=1, max_length=512, description="0-based; null: eight, 25 to 95 % of depth"
    )
    is_exclusive: bool = Field(True, description="One label a text, or any number of them")
    position: Literal["last", "answer", "both"] | None = Field(
        None, description="Tokens to read; null: the answers', or the last of prompts without one"
    )
    own_answer_tokens: int | None = Field(
        None, ge=1, le=512, description="With `bundled`: let the model answer, and read its answers"
    )
    seed: Seed = Field(0, description="Of the split and the weights")


_KINDS: dict[str, type[VectorBuildRequest] | type[ClassifierBuildRequest]] = {
    "vector": VectorBuildRequest,
    "classifier": ClassifierBuildRequest,
}


def read_build(
    body: dict[str, Any], *, max_rows: int, max_chars: int
) -> VectorBuildRequest | ClassifierBuildRequest:
    """Return the validated request.

    Args:
        body: the JSON object.
        max_rows: pairs or texts it may bring.
        max_chars: characters they may have together.

    Raises:
        RequestError: the first field at fault, its JSON path in `param`; 413 for more rows or
            characters than allowed.
    """
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RequestError(
            f"kind must be 'vector' or 'classifier', not {str(kind)[:40]!r}."
            if kind is not None
            else "kind is missing; it is 'vector' or 'classifier'.",
            param="kind",
        )
    model = _KINDS[kind]
    try:
        request = model.model_validate(body)
    except ValidationError as error:
        raise refused(error, known=model.model_fields) from None
    if isinstance(request, VectorBuildRequest):
        _one_of(request, "concept", "pairs", "describe")
        if (request.describe is None) != (request.against is None):
            raise RequestError("describe and against go together.", param="against")
        if request.map and not request.calibrate:
            raise RequestError(
                "A map shows multiples of the calibrated dose; send calibrate true, or leave map "
                "out.",
                param="map",
            )
        name, rows = "pairs", request.pairs
    else:
        _one_of(request, "bundled", "texts")
        if request.own_answer_tokens is not None and request.bundled is None:
            raise RequestError(
                "own_answer_tokens goes with bundled: texts have their answers.",
                param="own_answer_tokens",
            )
        name, rows = "texts", request.texts
    if rows is not None:
        _check_rows(rows, name=name, max_rows=max_rows, max_chars=max_chars)
    return request


def _one_of(request: BuildRequest, *sources: str) -> None:
    given = [name for name in sources if getattr(request, name) is not None]
    if len(given) != 1:
        raise RequestError(
            f"Give one of {', '.join(sources)}.", param=given[1] if given else sources[0]
        )


def _check_rows(rows: Sequence[Any], *, name: str, max_rows: int, max_chars: int) -> None:
    if len(rows) > max_rows:
        raise _too_large(
            f"{name} has {len(rows)} rows; this server takes {max_rows} (--build-max-rows).", name
        )
    n_chars = 0
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            known = _TEXT_FIELDS if name == "texts" else _pair_fields(row)
            for key in row:
                if key not in known:
                    param = f"{name}[{i}].{key[:80]}"
                    raise RequestError(
                        f"{param} is not a known field.{did_you_mean(key[:80], known)} "
                        f"Known: {listed(known)}.",
                        param=param,
                        code="unknown_field",
                    )
            n_chars += sum(len(value) for value in row.values() if isinstance(value, str))
    if n_chars > max_chars:
        raise _too_large(
            f"{name} have {n_chars} characters; this server takes {max_chars} (--build-max-chars).",
            name,
        )


def _pair_fields(row: dict[str, Any]) -> tuple[str, ...]:
    is_contrast = "positive" in row or "negative" in row
    return _CONTRAST_FIELDS if is_contrast else _PAIR_FIELDS


def _too_large(message: str, param: str) -> RequestError:
    return RequestError(message, param=param, status=413, code="build_too_large")

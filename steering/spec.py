"""What a request may ask for: the `steering` field of the wire, validated.

A spec is an object, or a string (`expression.py`) for the common case. Unknown
fields, non-finite numbers, doubled aliases and oversized lists are refused with the JSON path.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.steering.errors import SpecError, did_you_mean, listed
from trimtab.steering.expression import read_expression

MAX_TERMS = 64
TERM_KINDS = ("vectors", "ablate", "guidance")
SCALE_ALIASES = ("strength", "alpha", "coeff", "coefficient", "multiplier")
MAX_GUIDANCE_LABELS = 16
MAX_STEPS = 16
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"
_PROBE_PATTERN = ID_PATTERN.removesuffix("$") + "(?:/" + LABEL_PATTERN.strip("^$") + ")?$"

ArtifactId = Annotated[str, Field(pattern=ID_PATTERN, description="Name of a stored artifact")]
ProbeName = Annotated[
    str,
    Field(
        pattern=_PROBE_PATTERN,
        description="A vector's id, or a classifier's id and label as `tone/casual`",
    ),
]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]
Labels = Annotated[list[Label], Field(max_length=MAX_GUIDANCE_LABELS)]
Scale = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Layers = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1, max_length=512)]
Count = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Apply(_Strict):
    """Which tokens a term touches. All true by default; `thinking` follows `generation`."""

    prompt: bool = Field(True, description="Tokens of the prompt")
    generation: bool = Field(True, description="Generated tokens outside the thinking span")
    thinking: bool | None = Field(
        None, description="Generated tokens inside <think>...</think>; null follows `generation`"
    )
    first: Count | None = Field(None, description="Only the first n generated tokens")
    after: Count | None = Field(None, description="Only generated tokens after the first n")


class When(_Strict):
    """A gate: apply only where (or if) a probe's probability is above or below a threshold."""

    probe: ProbeName
    above: Annotated[float, Field(ge=0, le=1)] | None = None
    below: Annotated[float, Field(ge=0, le=1)] | None = None
    layer: Annotated[int, Field(strict=True)] | None = Field(
        None, description="Layer the probe reads; null takes the artifact's best layer"
    )
    per: Literal["token", "prompt"] = Field(
        "token",
        description="`token` decides at every token; `prompt` decides once, on the prompt's mean",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> When:
        if (self.above is None) == (self.below is None):
            raise ValueError("a gate needs exactly one of `above` and `below`")
        return self


class _Term(_Strict):
    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = [name for name in ("scale", *SCALE_ALIASES) if name in value]
        if len(given) > 1:
            raise ValueError(f"{given[1]!r} is an alias of {given[0]!r}; give only one of them")
        if given and given[0] != "scale":
            value = {("scale" if k == given[0] else k): v for k, v in value.items()}
        return value


class VectorTerm(_Term):
    """Add a stored vector. Scale 1.0 is the vector's calibrated unit; negative pushes away."""

    id: ArtifactId
    scale: Scale = 1.0
    layers: Layers | None = Field(None, description="0-based layers; null takes the calibrated")
    apply: Apply = Apply()
    normalize: bool | None = Field(
        None, description="Keep the hidden state's norm; null takes the vector's own setting"
    )
    when: When | None = Field(None, description="This term's gate; null takes the request's")


class AblateTerm(_Term):
    """Remove a direction from the hidden state, or set its component to a value."""

    id: ArtifactId
    scale: Scale = Field(1.0, description="Share removed: 1 removes all, 2 reflects")
    to: Scale = Field(0.0, description="Set the component to this many calibrated units")
    layers: Layers | None = Field(None, description="0-based layers; null takes all it has")
    apply: Apply = Apply()
    when: When | None = None


class GuidanceTerm(_Term):
    """Follow a classifier's gradient toward some labels and away from others."""

    classifier: ArtifactId
    target: Labels = Field([], description="Labels to steer toward")
    avoid: Labels = Field([], description="Labels to steer away from")
    avoid_rival: Flag = Field(
        False,
        description="Steer away from the likeliest label outside `target` as well, found anew at "
        "every token and step",
    )
    scale: Scale = Field(1.0, description="Times the dose calibrated for these labels")
    dose: Annotated[Scale, Field(ge=0)] | None = Field(
        None,
        description="In place of `scale`: the steps' summed length relative to the layer's |h|",
    )
    over_dose: Flag = Field(
        False, description="Allow more than the calibrated dose, or one that was never calibrated"
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] = Field(
        1, description="Gradient steps that share the dose"
    )
    decay: Annotated[Scale, Field(gt=0, le=2)] = Field(
        1.0, description="Length of a step relative to the one before"
    )
    loss: Literal["logits", "softmax", "sigmoid"] = Field(
        "logits", description="Mean logits, or mean log-probabilities of that kind"
    )
    until: Annotated[Scale, Field(ge=0.5, lt=1)] | None = Field(
        None, description="No further step where the target is at least this likely"
    )
    reflect: Flag = Field(
        False, description="Turn the avoided labels' gradient component around; needs no target"
    )
    normalize: Flag = Field(False, description="Keep the hidden state's norm")
    layers: Layers | None = Field(None, description="0-based layers; null takes the classifier's")
    apply: Apply = Apply()
    when: When | None = None

    @model_validator(mode="after")
    def _says_where_to(self) -> GuidanceTerm:
        if not self.named and not self.avoid_rival:
            raise ValueError("name at least one label in `target` or `avoid`")
        if self.dose is not None and "scale" in self.model_fields_set:
            raise ValueError("`scale` and `dose` are two ways to say the same; give one of them")
        if self.scale < 0:
            raise ValueError("`scale` is negative; swap `target` and `avoid` instead")
        if self.reflect and self.target:
            raise ValueError("`reflect` turns avoided labels around and takes no `target`")
        if both := sorted(set(self.target) & set(self.avoid)):
            raise ValueError(f"{both[0]!r} is both in `target` and in `avoid`")
        if len(set(self.named)) != len(self.named):
            raise ValueError("a label is named twice")
        return self

    @property
    def named(self) -> list[str]:
        """Every label the request names."""
        return self.target + self.avoid


class SteeringSpec(_Strict):
    """A request's steering: vectors to add, directions to ablate, classifiers to follow."""

    vectors: Annotated[list[VectorTerm], Field(max_length=MAX_TERMS)] = []
    ablate: Annotated[list[AblateTerm], Field(max_length=MAX_TERMS)] = []
    guidance: Annotated[list[GuidanceTerm], Field(max_length=MAX_TERMS)] = []
    when: When | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> SteeringSpec:
        if not any(getattr(self, kind) for kind in TERM_KINDS):
            raise ValueError(
                "the steering spec is empty; name at least one vector, ablation or classifier, "
                "or leave the field out"
            )
        n_labels = sum(len(term.named) for term in self.guidance)
        if n_labels > MAX_GUIDANCE_LABELS:
            raise ValueError(
                f"guidance names {n_labels} labels; at most {MAX_GUIDANCE_LABELS} are allowed"
            )
        return self


def parse_spec(value: Any, *, path: str = "steering") -> SteeringSpec:
    """Read a spec from JSON-like data or from the string form.

    Args:
        value: a dict, a string expression, or a `SteeringSpec`.
        path: JSON path of the value, put before the field's own in errors.

    Raises:
        SpecError: with `param` the JSON path of the first field at fault.
    """
    if isinstance(value, SteeringSpec):
        return value
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise SpecError(f"{path} is not valid JSON: {error}.", param=path) from None
        else:
            return parse_expression(value, path=path)
    if isinstance(value, list):
        raise SpecError(
            f"{path} is a list; give an object like "
            '{"vectors": [{"id": "warm", "scale": 1.0}]} or a string like "1.0 warm".',
            param=path,
        )
    if not isinstance(value, dict):
        raise SpecError(
            f"{path} must be an object or a string, not {type(value).__name__}.", param=path
        )
    for kind in TERM_KINDS:
        terms = value.get(kind)
        if isinstance(terms, list) and len(terms) > MAX_TERMS:
            raise SpecError(
                f"{path}.{kind} has {len(terms)} terms; at most {MAX_TERMS} are allowed.",
                param=f"{path}.{kind}",
            )
    try:
        return SteeringSpec.model_validate(value)
    except ValidationError as error:
        raise _spec_error(error, path=path) from None


def parse_expression(text: str, *, path: str = "steering") -> SteeringSpec:
    """Read the string form; see `read_expression`.

    Raises:
        SpecError: naming the place in the text where reading stopped.
    """
    try:
        return SteeringSpec.model_validate(read_expression(text, path=path, max_terms=MAX_TERMS))
    except ValidationError as error:
        raise _spec_error(error, path=path) from None


def json_path(location: tuple[Any, ...], *, root: str) -> str:
    """Return `root.vectors[0].scale` for a pydantic error location."""
    path = root
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _spec_error(error: ValidationError, *, path: str) -> SpecError:
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    param = json_path(location, root=path)
    if first["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        name = str(location[-1])
        return SpecError(
            f"{param} is not a known field.{did_you_mean(name, known)} Known: {listed(known)}.",
            param=param,
        )
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "finite_number":
        reason = f"must be a finite number, got {first['input']!r}"
    elif first["type"] == "string_pattern_mismatch":
        shown = str(first["input"])[:80]
        reason = f"must be letters, digits, '.', '_' and '-' (at most 64), got {shown!r}"
    return SpecError(f"{param}: {reason.removesuffix('.')}.", param=param)


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    names = [part for part in location if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {
        "vectors": VectorTerm,
        "ablate": AblateTerm,
        "guidance": GuidanceTerm,
        "apply": Apply,
        "when": When,
    }
    model = models.get(names[-1], SteeringSpec) if names else SteeringSpec
    return list(model.model_fields)

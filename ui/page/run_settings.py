"""What one run of the page asks for: the prompt, the steering, the sampling."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.steering.errors import TrimtabError
from trimtab.steering.spec import ArtifactId, Label, ProbeName, When

MAX_LINK_CHARS = 16_000
MAX_PROMPT_CHARS = 8_000

_Scale = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]


class LinkError(TrimtabError):
    """A shared link that cannot be read."""

    code = "invalid_link"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vector(_Strict):
    """A slider: a stored vector and how much of it, in calibrated units."""

    id: ArtifactId
    scale: _Scale = 0.0


class Guidance(_Strict):
    """A classifier's labels to steer toward and away from; 1.0 is the calibrated dose."""

    classifier: ArtifactId
    target: Annotated[list[Label], Field(max_length=16)] = []
    avoid: Annotated[list[Label], Field(max_length=16)] = []
    scale: Annotated[float, Field(ge=0, le=4)] = 1.0


class RunSettings(_Strict):
    """Everything that an answer depends on, the conversation before it apart."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    preset: ArtifactId | None = None
    vectors: Annotated[list[Vector], Field(max_length=8)] = []
    ablate: Annotated[list[ArtifactId], Field(max_length=8)] = []
    guidance: Annotated[list[Guidance], Field(max_length=8)] = []
    when: When | None = None
    probes: Annotated[list[ProbeName], Field(max_length=8)] = []
    max_tokens: Annotated[int, Field(ge=1, le=2048)] = 128
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [vector.id for vector in self.vectors]
        if len(set(names)) != len(names):
            raise ValueError("a vector has two sliders")
        return self

    @property
    def steering(self) -> dict[str, Any] | None:
        """The API's `steering` field, or None if nothing is chosen (a preset may still steer)."""
        guidance = [g for g in self.guidance if g.target or g.avoid]
        if not (self.vectors or self.ablate or guidance):
            return None
        spec: dict[str, Any] = {}
        if self.vectors:
            spec["vectors"] = [{"id": v.id, "scale": v.scale} for v in self.vectors]
        if self.ablate:
            spec["ablate"] = [{"id": name} for name in self.ablate]
        if guidance:
            spec["guidance"] = [_guidance(term) for term in guidance]
        if self.when is not None:
            spec["when"] = self.when.model_dump(exclude_defaults=True)
        return spec

    @property
    def is_steered(self) -> bool:
        """Whether the steered side asks for anything."""
        return self.preset is not None or self.steering is not None

    def model_name(self, served: str) -> str:
        """Return the model to ask for: the served one, or the chosen preset of it."""
        return served if self.preset is None else f"{served}:{self.preset}"

    def sampling(self) -> dict[str, Any]:
        """Return the API's fields that say how to choose tokens."""
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return fields if self.seed is None else {**fields, "seed": self.seed}


def _guidance(term: Guidance) -> dict[str, Any]:
    fields = {name: value for name in ("target", "avoid") if (value := getattr(term, name))}
    over = {"over_dose": True} if term.scale > 1 else {}
    return {"classifier": term.classifier, **fields, "scale": term.scale, **over}


def read_settings(value: Any) -> RunSettings:
    """Return the settings from the page's own JSON, checked.

    Raises:
        LinkError: it is none.
    """
    try:
        return RunSettings.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        raise LinkError(f"These settings cannot be used: {where}: {first['msg']}.") from None


def to_link(settings: RunSettings) -> str:
    """Return the settings as the text of a link's `run` parameter."""
    data = settings.model_dump_json(exclude_defaults=True).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def from_link(text: str) -> RunSettings:
    """Read settings from a link.

    Raises:
        LinkError: cut short, too long, or not made by this page.
    """
    if len(text) > MAX_LINK_CHARS:
        raise LinkError("This link is too long to be one of this page's; ask for it again.")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return RunSettings.model_validate_json(data)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, ValidationError) and error.errors()[0]["type"] != "json_invalid":
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise LinkError(
                f"This link's settings cannot be used: {where}: {first['msg']}."
            ) from None
        raise LinkError("This link is broken or cut short; ask for it again.") from None

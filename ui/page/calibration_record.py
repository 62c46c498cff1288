"""A vector's calibration, read from its card. A file from elsewhere may say anything there."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.steering.errors import TrimtabError

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=512)]
_MOST = 256  # rows or columns that a page draws


class RecordError(TrimtabError):
    """A calibration that trimtab did not write."""

    code = "unknown_calibration"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Criteria(_Read):
    """What calibration accepts."""

    max_rise: Annotated[float, Field(allow_inf_nan=False, gt=0)]


class Candidate(_Read):
    """A layer set that was compared, at equal damage."""

    layers: _Layers
    dose: _Number
    effect: _Number


class Point(_Read):
    """One scale on the chosen layers."""

    scale: _Number
    margin: _Number
    rise: _Number


class Knee(_Read):
    """What was chosen as scale 1.0."""

    layers: _Layers
    dose: _Number
    is_clean: bool
    problem: Annotated[str, Field(max_length=1000)] | None = None


class LayerMap(_Read):
    """Effect and damage a layer set and scale; None where the model answered with infinity."""

    layers: Annotated[list[_Layers], Field(min_length=1, max_length=_MOST)]
    scales: Annotated[list[_Number], Field(min_length=1, max_length=_MOST)]
    dose: _Number
    effect: list[list[_Number | None]]
    rise: list[list[_Number | None]]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for table in (self.effect, self.rise):
            if len(table) != len(self.layers) or {len(row) for row in table} != {len(self.scales)}:
                raise ValueError("a map has a row a layer set and a number a scale")
        return self


class Record(_Read):
    """A calibration's record."""

    criteria: Criteria
    n_pairs: Annotated[int, Field(ge=0)]
    candidates: Annotated[list[Candidate], Field(max_length=_MOST)]
    curve: Annotated[list[Point], Field(min_length=2, max_length=_MOST)]
    knee: Knee
    map: LayerMap | None = None

    @property
    def points(self) -> list[Point]:
        """The curve, from the lowest scale to the highest."""
        return sorted(self.curve, key=lambda point: point.scale)

    def effect(self, point: Point) -> float:
        """Return how far the pairs' margin is from scale 0's, nats a token."""
        zero = min(self.curve, key=lambda point: abs(point.scale))
        return point.margin - zero.margin


def read_record(calibration: dict[str, Any]) -> Record:
    """Return a card's `calibration`, checked.

    Raises:
        RecordError: it is not of trimtab's form.
    """
    try:
        return Record.model_validate(calibration)
    except ValidationError:
        raise RecordError(
            "This vector's calibration is not of trimtab's form and cannot be drawn. Calibrate it "
            "again, or build it again."
        ) from None

"""Where on a vector's slider the text is fluent, strained or broken, from its calibration curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

# Perplexity twice the unsteered model's: on neutral text, or of the steered text as the unsteered
# model reads it.
_BROKEN_RISE = 1.0
_BROKEN_SURPRISE = 2.0
_STEPS = 40

LEVELS = ("fluent", "strained", "broken", "unmeasured")


_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Point(BaseModel):
    scale: _Number
    rise: _Number
    repetition: _Number
    surprise: _Number


class _Criteria(BaseModel):
    max_rise: _Number
    max_repetition: _Number


class _Record(BaseModel):
    curve: list[_Point]
    criteria: _Criteria


@dataclass(frozen=True)
class Zone:
    """A stretch of scales. `level` is one of `LEVELS`."""

    start: float
    end: float
    level: str


def zones(calibration: dict[str, Any] | None, *, reach: float) -> list[Zone]:
    """Return the zones from -reach to reach, in order and without gaps.

    Between two measured scales the rise is interpolated on a logarithm, surprise and repetition
    straight. Fluent is what calibration accepts at scale 1; broken is where perplexity on neutral
    text or of the steered text is twice the unsteered model's, or repetition is past what
    calibration accepts and above its value at scale 0; strained lies between.

    Args:
        calibration: a vector's record, or None if it has none; one that trimtab did not write
            measures nothing that is known here.
        reach: the slider's largest scale.
    """
    unmeasured = [Zone(-reach, reach, "unmeasured")]
    try:
        record = _Record.model_validate(calibration)
    except ValidationError:
        return unmeasured
    points = sorted({point.scale: point for point in record.curve}.values(), key=_scale)
    if len(points) < 2 or points[0].scale >= reach or points[-1].scale <= -reach:
        return unmeasured
    level_at = _judge(points, record.criteria)
    first, last = max(points[0].scale, -reach), min(points[-1].scale, reach)
    n = round((last - first) * _STEPS)
    found = [Zone(-reach, first, "unmeasured")] if first > -reach else []
    for i in range(n):
        start, end = first + i / _STEPS, first + (i + 1) / _STEPS
        level = level_at((start + end) / 2)
        if found and found[-1].level == level:
            found[-1] = Zone(found[-1].start, end, level)
        else:
            found.append(Zone(start, end, level))
    if last < reach:
        found.append(Zone(last, reach, "unmeasured"))
    return found


def _scale(point: _Point) -> float:
    return point.scale


def _judge(points: list[_Point], criteria: _Criteria) -> Callable[[float], str]:
    zero = min(points, key=lambda point: abs(point.scale))
    # Scale 1 was accepted, by limits that were met to within a few percent.
    one = min(points, key=lambda point: abs(point.scale - 1))
    fluent_rise = max(criteria.max_rise, one.rise)
    most_repeated = max(zero.repetition, one.repetition) + criteria.max_repetition

    def level(scale: float) -> str:
        rise = _between(points, scale, lambda point: math.log1p(max(point.rise, -0.5)))
        surprise = _between(points, scale, lambda point: point.surprise)
        repeated = _between(points, scale, lambda point: point.repetition)
        if (
            rise >= math.log1p(_BROKEN_RISE)
            or surprise >= _BROKEN_SURPRISE * zero.surprise
            or repeated > most_repeated
        ):
            return "broken"
        return "fluent" if math.expm1(rise) <= fluent_rise + 1e-9 else "strained"

    return level


def _between(points: list[_Point], scale: float, value: Callable[[_Point], float]) -> float:
    for below, above in itertools.pairwise(points):
        if below.scale <= scale <= above.scale:
            share = (scale - below.scale) / (above.scale - below.scale)
            return value(below) + share * (value(above) - value(below))
    return value(points[0] if scale < points[0].scale else points[-1])

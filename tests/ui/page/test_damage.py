"""Zones of a slider from a calibration curve."""

from __future__ import annotations

import itertools

import pytest

from trimtab.ui.page.damage import zones

CRITERIA = {"max_rise": 0.08, "max_repetition": 0.15}


def record(**changes: list[float]) -> dict:
    """A curve at scales -1 to 4; every measure but those given stays as at scale 0."""
    scales = [-1.0, 0.0, 1.0, 2.0, 4.0]
    measures = {
        "rise": [0.0] * 5,
        "surprise": [2.0] * 5,
        "repetition": [0.0] * 5,
    } | changes
    points = [
        {"scale": scale, **{name: values[i] for name, values in measures.items()}}
        for i, scale in enumerate(scales)
    ]
    return {"criteria": CRITERIA, "curve": points}


def level_at(calibration: dict, scale: float) -> str:
    (level,) = {z.level for z in zones(calibration, reach=4.0) if z.start < scale < z.end}
    return level


def test_zones_cover_the_slider_without_gaps():
    """A gap would draw the zones beside where they are."""
    found = zones(record(rise=[0.1, 0.0, 0.08, 0.4, 3.0]), reach=4.0)
    assert (found[0].start, found[-1].end) == (-4.0, 4.0)
    for before, after in itertools.pairwise(found):
        assert before.end == pytest.approx(after.start)
        assert before.level != after.level


def test_what_nobody_measured_is_not_called_fluent():
    """A slider past the curve's end must not promise anything."""
    assert level_at(record(), -2.0) == "unmeasured"
    assert [z.level for z in zones(None, reach=4.0)] == ["unmeasured"]


def test_scale_one_is_fluent_and_damage_begins_where_perplexity_doubles():
    """The zone's border is the measured one, not a fixed scale."""
    calibration = record(rise=[0.1, 0.0, 0.09, 0.4, 3.0])
    assert level_at(calibration, 0.99) == "fluent"
    assert level_at(calibration, 1.5) == "strained"
    # log(1 + rise) from log 1.4 at 2 to log 4 at 4 passes log 2 at 2.68.
    assert level_at(calibration, 2.6) == "strained"
    assert level_at(calibration, 2.75) == "broken"


@pytest.mark.parametrize(
    "sign", [{"surprise": [2, 2, 2, 2, 8.0]}, {"repetition": [0, 0, 0, 0, 0.9]}]
)
def test_each_sign_of_damage_counts_by_itself(sign: dict):
    """Text that loops is broken though neutral text is read as well as before."""
    assert level_at(record(**sign), 3.9) == "broken"
    assert level_at(record(**sign), 1.9) == "fluent"


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"curve": "steep"},
        {"curve": [{"scale": 1.0}] * 3, "criteria": CRITERIA},
        record() | {"criteria": None},
        {"curve": [record()["curve"][0]] * 4, "criteria": CRITERIA},
        {"curve": [point | {"scale": 1e300} for point in record()["curve"]], "criteria": CRITERIA},
        {"curve": [p | {"scale": p["scale"] + 99} for p in record()["curve"]]}
        | {"criteria": CRITERIA},
    ],
)
def test_a_record_of_another_form_measures_nothing(strange):
    """One file from elsewhere must not close the panel for everybody."""
    assert [zone.level for zone in zones(strange, reach=4.0)] == ["unmeasured"]

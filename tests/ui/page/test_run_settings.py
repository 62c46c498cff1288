"""A run's settings: what they ask of the server, and the link they travel in."""

from __future__ import annotations

import base64
import json

import pytest

from trimtab.steering.spec import parse_spec
from trimtab.ui.page.run_settings import (
    MAX_LINK_CHARS,
    LinkError,
    RunSettings,
    from_link,
    read_settings,
    to_link,
)

FULL = {
    "prompt": "What now? ünï <b>",
    "preset": "calm",
    "vectors": [{"id": "warm", "scale": -0.5}, {"id": "formal", "scale": 2.0}],
    "ablate": ["refusing"],
    "guidance": [{"classifier": "tone", "target": ["kind"], "avoid": ["casual"], "scale": 1.25}],
    "when": {"probe": "tone/casual", "above": 0.5},
    "probes": ["tone", "warm"],
    "max_tokens": 40,
    "temperature": 0.7,
    "seed": 3,
}


def test_a_link_brings_back_every_setting():
    """A field left out of the link would steer its receiver another way."""
    settings = read_settings(FULL)
    assert from_link(to_link(settings)) == settings
    assert set(FULL) == set(RunSettings.model_fields)


def test_the_steering_is_a_spec_the_server_reads():
    """Page and server have one language."""
    spec = parse_spec(read_settings(FULL).steering)
    assert [(v.id, v.scale) for v in spec.vectors] == [("warm", -0.5), ("formal", 2.0)]
    assert spec.ablate[0].id == "refusing"
    assert spec.guidance[0].over_dose  # past the calibrated dose only by the visitor's own hand
    assert spec.when is not None
    assert spec.when.above == 0.5


def test_a_dose_within_its_limit_does_not_lift_the_limit():
    """`over_dose` on every request would take the server's guard away."""
    within = read_settings({"guidance": [{"classifier": "tone", "target": ["kind"]}]})
    assert within.steering == {
        "guidance": [{"classifier": "tone", "target": ["kind"], "scale": 1.0}]
    }


def test_nothing_chosen_asks_for_nothing():
    """An empty spec is refused by the server; the field must be left out."""
    empty = read_settings(
        {"guidance": [{"classifier": "tone"}], "when": {"probe": "a", "above": 0}}
    )
    assert empty.steering is None
    assert not empty.is_steered
    assert read_settings({"preset": "calm"}).is_steered
    assert read_settings({"preset": "calm"}).model_name("m") == "m:calm"


@pytest.mark.parametrize(
    "text",
    [
        "%%%",
        "abc",
        to_link(read_settings(FULL))[:-7],
        "A" * (MAX_LINK_CHARS + 1),
        base64.urlsafe_b64encode(json.dumps({"path": "/etc"}).encode()).decode(),
        base64.urlsafe_b64encode(json.dumps({"max_tokens": 10**9}).encode()).decode(),
        base64.urlsafe_b64encode(b'{"vectors": [{"id": "../x"}]}').decode(),
        base64.urlsafe_b64encode(b'{"vectors": [{"id": "a", "scale": NaN}]}').decode(),
    ],
)
def test_a_link_of_somebody_elses_making_is_refused(text: str):
    """What comes in by a link is a stranger's."""
    with pytest.raises(LinkError, match="link"):
        from_link(text)


def test_a_vector_has_one_slider():
    """Two sliders of one vector would add up unseen."""
    with pytest.raises(LinkError, match="two sliders"):
        read_settings({"vectors": [{"id": "a"}, {"id": "a"}]})

"""The steering field: what is accepted, and that everything else is refused with its JSON path."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.steering.errors import SpecError
from trimtab.steering.spec import (
    MAX_TERMS,
    SCALE_ALIASES,
    Apply,
    SteeringSpec,
    VectorTerm,
    parse_expression,
    parse_spec,
)


def scales(spec: SteeringSpec) -> list[tuple[str, float]]:
    return [(term.id, term.scale) for term in spec.vectors]


def refused(value: Any, param: str, *words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(value)
    assert caught.value.param == param
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("alias", SCALE_ALIASES)
@pytest.mark.parametrize("kind", ["vectors", "ablate"])
def test_an_alias_means_scale(alias: str, kind: str) -> None:
    """An alias that is read as unknown, or dropped, steers at 1.0 instead of what was asked."""
    term = getattr(parse_spec({kind: [{"id": "a", alias: 1.25}]}), kind)[0]
    assert term.scale == 1.25


@pytest.mark.parametrize("other", ["scale", *SCALE_ALIASES[1:]])
def test_two_names_for_scale_are_refused(other: str) -> None:
    """Taking either of two contradicting numbers silently steers by the wrong one."""
    refused({"vectors": [{"id": "a", "strength": 1, other: 2}]}, "steering.vectors[0]", "strength")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["scale", "alpha"])
def test_non_finite_scales_are_refused(number: float, field: str) -> None:
    """NaN or infinity in one request's row turns its hidden states, and the text, to noise."""
    refused({"vectors": [{"id": "a", field: number}]}, "steering.vectors[0].scale", "finite")
    refused({"ablate": [{"id": "a", "to": number}]}, "steering.ablate[0].to", "finite")


def test_numbers_past_float_are_refused() -> None:
    """JSON's 1e400 is infinity to Python; as a big integer it must not overflow a conversion."""
    body = json.loads('{"vectors": [{"id": "a", "scale": 1e400}]}')
    refused(body, "steering.vectors[0].scale", "finite")
    refused('{"vectors": [{"id": "a", "scale": 1e400}]}', "steering.vectors[0].scale", "finite")
    refused("1e400 a", "steering.vectors[0].scale", "finite")
    refused({"vectors": [{"id": "a", "scale": 10**400}]}, "steering.vectors[0].scale")


@pytest.mark.parametrize(
    ("value", "param", "word"),
    [
        ({"vectors": [{"id": "a"}], "vector": []}, "steering.vector", "'vectors'"),
        ({"vectors": [{"id": "a", "scal": 1}]}, "steering.vectors[0].scal", "'scale'"),
        (
            {"vectors": [{"id": "a"}, {"id": "b", "apply": {"promt": True}}]},
            "steering.vectors[1].apply.promt",
            "'prompt'",
        ),
        (
            {"ablate": [{"id": "a", "when": {"probe": "p", "abov": 0.5}}]},
            "steering.ablate[0].when.abov",
            "'above'",
        ),
        ({"vectors": [{"id": "a"}], "x[0]": 1}, "steering.x[0]", "not a known field"),
        ({"vectors": [{"id": "a"}], "[": 1}, "steering.[", "not a known field"),
    ],
)
def test_unknown_fields_are_named_with_the_nearest_known(
    value: dict, param: str, word: str
) -> None:
    """A misspelt field that is ignored answers 200 with text that is not steered as asked."""
    refused(value, param, word)


@pytest.mark.parametrize(
    "value",
    [
        {"vectors": [{"id": "a"}] * 10_000},
        {"ablate": [{"id": "a"}] * 10_000},
        "+".join(["a"] * (MAX_TERMS + 1)),
        " + ".join(["a"] * 1_000_000),
    ],
)
def test_too_many_terms_are_refused_at_once(value: Any) -> None:
    """One request with 100,000 vectors must not keep the server busy validating each."""
    started = time.monotonic()
    with pytest.raises(SpecError, match=r"at most|more than"):
        parse_spec(value)
    assert time.monotonic() - started < 1


def test_as_many_terms_as_allowed_are_read() -> None:
    """An off-by-one in the bound refuses the largest legal request."""
    assert len(parse_spec({"vectors": [{"id": "a"}] * MAX_TERMS}).vectors) == MAX_TERMS
    assert len(parse_expression("+".join(["a"] * MAX_TERMS)).vectors) == MAX_TERMS


@pytest.mark.parametrize("unit", ["1", " ", "a", "1.", "e", "*", "- "])
def test_reading_time_does_not_grow_with_the_square_of_the_text(unit: str) -> None:
    """Twenty thousand digits took a backtracking pattern 19 s, on the event loop."""
    started = time.monotonic()
    for text in (unit * 16_000 + "!", "0.5 a + " + unit * 16_000 + "!"):
        with pytest.raises(SpecError):
            parse_expression(text)
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("honest", [("honest", 1.0)]),
        ("-honest", [("honest", -1.0)]),
        ("0.8 honest - 0.3 formal", [("honest", 0.8), ("formal", -0.3)]),
        ("  .5 a+2. b -1e-1 c ", [("a", 0.5), ("b", 2.0), ("c", -0.1)]),
        ("0.8*a - 0.3 * b + 2* c + 3 *d", [("a", 0.8), ("b", -0.3), ("c", 2.0), ("d", 3.0)]),
        ("1.5e1*a", [("a", 15.0)]),
        ("a-b.c_d + x", [("a-b.c_d", 1.0), ("x", 1.0)]),
        ("0 a", [("a", 0.0)]),
    ],
)
def test_expressions(text: str, expected: list) -> None:
    """A sign or a number that goes to the neighbour steers the opposite way."""
    assert scales(parse_spec(text)) == expected


def test_labels_of_one_classifier_are_one_term() -> None:
    """A term each would be several changes, each of the whole dose."""
    spec = parse_spec("0.5 tone/warm + 0.8 honest - tone/casual + tone/x-1.b - mood/sad")
    assert scales(spec) == [("honest", 0.8)]
    tone, mood = spec.guidance
    assert (tone.classifier, tone.target, tone.avoid, tone.scale) == (
        "tone", ["warm", "x-1.b"], ["casual"], 0.5,
    )  # fmt: skip
    assert (mood.classifier, mood.target, mood.avoid, mood.scale) == ("mood", [], ["sad"], 1.0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "  ", "0.8", "a b", "a + ", "a ++ b", "0.8honest", "a; drop", "1,5 a", "é", "-"),
        *("tone/", "/casual", "tone/casual expert", "tone/a/b", "1 tone/a + 2 tone/b"),
    ],
)
def test_unreadable_expressions_are_refused(text: str) -> None:
    """Reading the part that parses and dropping the rest steers by half of what was asked."""
    refused(text, "steering")


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z][A-Za-z0-9._]{0,20}", fullmatch=True),
            st.floats(-100, 100, allow_nan=False),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_an_expression_is_its_object(terms: list[tuple[str, float]]) -> None:
    """The sugar must mean exactly what the object means, number for number."""
    text = " ".join(f"{'-' if scale < 0 else '+'} {abs(scale)!r} {name}" for name, scale in terms)
    spec = {"vectors": [{"id": name, "scale": scale} for name, scale in terms]}
    assert parse_spec(text) == parse_spec(spec) == parse_spec(json.dumps(spec))


def test_a_gate_has_exactly_one_threshold() -> None:
    """With both or none, "when" is not a question a probe can answer."""
    for when in ({"probe": "p"}, {"probe": "p", "above": 0.5, "below": 0.2}):
        refused({"vectors": [{"id": "a"}], "when": when}, "steering.when", "exactly one")
    for when in ({"probe": "p", "above": 0}, {"probe": "p", "below": 1}):
        assert parse_spec({"vectors": [{"id": "a"}], "when": when}).when is not None


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), "x"])
def test_a_threshold_is_a_probability(threshold: Any) -> None:
    """A threshold no probability can reach leaves the request unsteered without a word."""
    when = {"probe": "p", "above": threshold}
    refused({"vectors": [{"id": "a"}], "when": when}, "steering.when.above")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"vectors": [{"id": "../etc/passwd"}]}, "steering.vectors[0].id"),
        ({"vectors": [{"id": "a/b"}]}, "steering.vectors[0].id"),
        ({"vectors": [{"id": "a\n"}]}, "steering.vectors[0].id"),
        ({"vectors": [{"id": "a" * 65}]}, "steering.vectors[0].id"),
        ({"vectors": [{"id": ""}]}, "steering.vectors[0].id"),
        ({"vectors": [{"scale": 1}]}, "steering.vectors[0].id"),
        ({"vectors": [{"id": "a", "layers": []}]}, "steering.vectors[0].layers"),
        ({"vectors": [{"id": "a", "layers": [1.5]}]}, "steering.vectors[0].layers[0]"),
        ({"vectors": [{"id": "a", "layers": [1, True]}]}, "steering.vectors[0].layers[1]"),
        ({"vectors": [{"id": "a", "apply": {"first": -1}}]}, "steering.vectors[0].apply.first"),
        ({"vectors": ["a"]}, "steering.vectors[0]"),
        ({"vectors": {"id": "a"}}, "steering.vectors"),
        ({"vectors": [], "ablate": []}, "steering"),
        ({}, "steering"),
        ([{"id": "a"}], "steering"),
        (3, "steering"),
        (None, "steering"),
        ('{"vectors": [', "steering"),
        ('{"vectors": ' + "[" * 100_000, "steering"),
    ],
)
def test_the_first_field_at_fault_is_named(value: Any, param: str) -> None:
    """An error without its place cannot be mended; one that escapes as another type is a 500."""
    refused(value, param)


def test_an_offending_id_is_shown_as_it_came() -> None:
    """A message that tidies dots away shows './x' for '../x'."""
    refused({"vectors": [{"id": "../x"}]}, "steering.vectors[0].id", "'../x'")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*SteeringSpec.model_fields, *VectorTerm.model_fields, "probe", "x["])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_json_raises_anything_but_a_spec_error(value: Any) -> None:
    """Whatever a client sends, the answer is a 400 with a path, never a 500."""
    param = "steering"
    try:
        parse_spec(value)
    except SpecError as error:
        param = error.param or ""
    assert param.startswith("steering")


def test_a_spec_survives_its_own_json() -> None:
    """A preset that is stored and read back must be the same request."""
    spec = parse_spec(
        {
            "vectors": [{"id": "a", "scale": 0.1, "layers": [3], "apply": {"prompt": False}}],
            "ablate": [{"id": "b", "to": 0.5, "when": {"probe": "p", "below": 0.25}}],
            "when": {"probe": "q", "above": 0.5, "per": "prompt"},
        }
    )
    assert parse_spec(spec.model_dump_json(exclude_defaults=True)) == spec
    assert spec.vectors[0].apply == Apply(prompt=False)

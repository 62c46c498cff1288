"""What a spec compiles to: refused where it must be, and equal plans known as equal."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.errors import DoseError, NotFoundError, SpecError, TrimtabError
from trimtab.steering.plan import MAX_PARTS, MAX_RANK, Plan, additive_plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.vector import VectorArtifact

WIDTH, N_LAYERS = 8, 4
MODEL = ModelRef("toy", "f" * 64, "llama", WIDTH, N_LAYERS)
NORMS = torch.tensor([10.0, 20.0, 40.0, 80.0])
FREE = Limits(max_dose=None)


def axis(i: int, size: float = 1.0) -> torch.Tensor:
    row = torch.zeros(WIDTH)
    row[i] = size
    return row


def made(name: str, rows: torch.Tensor, **changes: Any) -> VectorArtifact:
    """A vector on all layers, default layer 1, with a probe that reads layer 1."""
    facts: dict[str, Any] = {
        "id": name,
        "model": MODEL,
        "layers": tuple(range(N_LAYERS)),
        "directions": rows.repeat(N_LAYERS, 1),
        "default_layers": (1,),
        "method": "caa",
        "probe": torch.tensor([1.0, 0.0]).expand(N_LAYERS, 2).clone(),
        "probe_layer": 1,
    }
    return VectorArtifact(**facts | changes)


class Shelf(dict[str, VectorArtifact]):
    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        if name not in self:
            raise NotFoundError(f"Unknown vector {name!r}.", param=param)
        return self[name]


@pytest.fixture
def shelf() -> Shelf:
    generator = torch.Generator().manual_seed(0)
    random = {
        f"r{i}": made(f"r{i}", torch.randn(WIDTH, generator=generator)) for i in range(MAX_RANK + 1)
    }
    axes = {
        "x": made("x", axis(0, 2.0)),
        "y": made("y", axis(1, 2.0)),
        "kept": made("kept", axis(2), normalize=True),
        "zero": made("zero", torch.zeros(WIDTH)),
        "huge": made("huge", axis(0, 3e38)),
        "plain": made("plain", axis(0), probe=None, probe_layer=None),
    }
    return Shelf(axes | random)


def compiled(spec: Any, shelf: Shelf, limits: Limits = FREE) -> Plan:
    return compile_plan(parse_spec(spec), shelf, model=MODEL, hidden_norms=NORMS, limits=limits)


def refused(
    spec: Any, shelf: Shelf, param: str, *words: str, limits: Limits = FREE
) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        compiled(spec, shelf, limits)
    assert caught.value.param == param
    for word in words:
        assert word in caught.value.message
    return caught.value


def added(plan: Plan, layer: int = 1) -> torch.Tensor:
    add = plan.parts[0].layers[layer].add
    assert add is not None
    return add


# --- what is refused


def test_unknown_ids_are_named_with_their_place(shelf: Shelf) -> None:
    """An unknown id that is skipped answers 200 with unsteered text."""
    refused("x + nobody", shelf, "steering.vectors[1].id", "nobody")
    refused({"ablate": [{"id": "nobody"}]}, shelf, "steering.ablate[0].id")
    gated = {"vectors": [{"id": "x"}], "when": {"probe": "nobody", "above": 0.5}}
    refused(gated, shelf, "steering.when.probe")


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (ModelRef("other", "f" * 64, "llama", WIDTH * 2, N_LAYERS), "width"),
        (ModelRef("other", "e" * 64, "llama", WIDTH, N_LAYERS), "another model"),
        (ModelRef("other", None, "gpt2", WIDTH, N_LAYERS), "gpt2"),
        (ModelRef("other", None, "llama", WIDTH, N_LAYERS + 1), "layers"),
    ],
)
def test_another_models_vector_is_refused(shelf: Shelf, model: ModelRef, word: str) -> None:
    """A direction means nothing in another model's space, and of another width it crashes."""
    n = model.n_layers or N_LAYERS
    shelf["alien"] = made(
        "alien",
        torch.ones(model.hidden_size),
        model=model,
        layers=tuple(range(n)),
        directions=torch.ones(n, model.hidden_size),
        probe=torch.ones(n, 2),
    )
    refused("alien", shelf, "steering.vectors[0].id", word)
    refused({"ablate": [{"id": "alien"}]}, shelf, "steering.ablate[0].id", word)
    gated = {"vectors": [{"id": "x", "when": {"probe": "alien", "above": 0.5}}]}
    refused(gated, shelf, "steering.vectors[0].when.probe", word)


@pytest.mark.parametrize("kind", ["vectors", "ablate"])
@pytest.mark.parametrize(
    ("layers", "param"),
    [([1, 4], "[1]"), ([-1], "[0]"), ([10**9], "[0]"), ([1, 1], "")],
)
def test_layers_out_of_range_are_refused(
    shelf: Shelf, kind: str, layers: list[int], param: str
) -> None:
    """-1 taken as Python means it steers the last layer; 4 of 4 fails inside the batch."""
    spec = {kind: [{"id": "x", "layers": layers}]}
    refused(spec, shelf, f"steering.{kind}[0].layers{param}")


def test_a_layer_the_vector_lacks_is_refused(shelf: Shelf) -> None:
    """Taking the nearest or skipping it would steer other than asked."""
    shelf["one"] = made(
        "one", axis(0), layers=(1,), directions=axis(0)[None], probe=None, probe_layer=None
    )
    refused({"vectors": [{"id": "one", "layers": [2]}]}, shelf, "steering.vectors[0].layers[0]")


@pytest.mark.parametrize("kind", ["vectors", "ablate"])
def test_an_imported_vector_of_a_deeper_model_is_refused(shelf: Shelf, kind: str) -> None:
    """A GGUF file does not say its depth; its layer 9 of our 4 must not be an IndexError."""
    shelf["deep"] = made(
        "deep",
        axis(0),
        model=ModelRef("llama", None, "llama", WIDTH, None),
        layers=(1, 9),
        default_layers=(1, 9),
        directions=torch.ones(2, WIDTH),
        probe=None,
        probe_layer=None,
    )
    refused({kind: [{"id": "deep"}]}, shelf, f"steering.{kind}[0].layers", "layer 9")
    assert list(compiled({kind: [{"id": "deep", "layers": [1]}]}, shelf).parts[0].layers) == [1]


def test_gates_that_cannot_decide_are_refused(shelf: Shelf) -> None:
    """A gate that never opens, or opens after the layer it guards, is a silent no-op."""

    def gated(**when: Any) -> dict:
        return {"vectors": [{"id": "x", "when": {"above": 0.5} | when}]}

    refused(gated(probe="plain"), shelf, "steering.vectors[0].when.probe", "no fitted probe")
    refused(gated(probe="y", layer=7), shelf, "steering.vectors[0].when.layer")
    refused(gated(probe="zero"), shelf, "steering.vectors[0].when.layer", "zero")
    refused(gated(probe="y", layer=2), shelf, "steering.vectors[0].when", "layer 2")
    whole = {"vectors": [{"id": "x"}], "when": {"probe": "y", "above": 0.5, "layer": 3}}
    refused(whole, shelf, "steering.when", "layer 3")
    assert compiled(gated(probe="y", layer=1), shelf).parts[0].gate is not None


def test_contradictions_are_refused(shelf: Shelf) -> None:
    """Norm preservation is of the sum: one term's choice would silently undo the other's."""
    refused("x + kept", shelf, "steering.vectors[1].normalize")
    empty = {"vectors": [{"id": "x", "apply": {"prompt": False, "generation": False}}]}
    refused(empty, shelf, "steering.vectors[0].apply", "no token")
    thinking = {"vectors": [{"id": "x", "apply": {"thinking": True}}]}
    refused(
        thinking, shelf, "steering.vectors[0].apply.thinking", limits=Limits(None, thinking=False)
    )
    for scale in (-0.1, 2.1):
        refused({"ablate": [{"id": "x", "scale": scale}]}, shelf, "steering.ablate[0].scale")
    refused({"ablate": [{"id": "zero", "layers": [1]}]}, shelf, "steering.ablate[0].layers")


def test_too_many_combinations_are_refused(shelf: Shelf) -> None:
    """The bank's tables have a fixed size; past it a part would be dropped or overwrite another."""
    windows = [{"id": "x", "apply": {"first": n}} for n in range(1, MAX_PARTS + 2)]
    assert len(compiled({"vectors": windows[:-1]}, shelf).parts) == MAX_PARTS
    refused({"vectors": windows}, shelf, f"steering.vectors[{MAX_PARTS}]")
    ranks = [{"id": f"r{i}", "layers": [1]} for i in range(MAX_RANK + 1)]
    compiled({"ablate": ranks[:-1]}, shelf)
    refused({"ablate": ranks}, shelf, f"steering.ablate[{MAX_RANK}]")


def test_overflow_is_refused_even_without_a_limit(shelf: Shelf) -> None:
    """An infinite row makes NaN of the request's states; NaN also slips past `dose > limit`."""
    for limits in (FREE, Limits()):
        refused("1e38 x + 1e308 y", shelf, "steering.vectors[1].scale", limits=limits)
        refused("huge + huge", shelf, "steering", "overflows", limits=limits)
        refused({"ablate": [{"id": "x", "to": 1e39}]}, shelf, "steering", limits=limits)
        refused({"ablate": [{"id": "x", "to": 1e308}]}, shelf, "steering", limits=limits)
    json.dumps(compiled("1e30 x", shelf).report, allow_nan=False)


# --- dose


def test_dose_is_relative_to_the_layer(shelf: Shelf) -> None:
    """|x| is 2 and |h| is 20 at layer 1: an absolute limit would be 8 times off at layer 3."""
    plan = compiled({"vectors": [{"id": "x", "scale": -5, "layers": [1, 3]}]}, shelf)
    assert plan.report["dose"] == {"1": 0.5, "3": 0.125}


def test_a_dose_over_the_limit_names_its_term(shelf: Shelf) -> None:
    """A limit checked a term at a time is passed by asking for the same thing twice."""
    compiled("10 x", shelf, Limits(max_dose=1.0))
    error = refused("-10.1 x", shelf, "steering.vectors[0].scale", limits=Limits(max_dose=1.0))
    assert isinstance(error, DoseError)
    refused("4 x + 7 x", shelf, "steering.vectors[1].scale", limits=Limits(max_dose=1.0))
    compiled("7 x + 7 y", shelf, Limits(max_dose=1.0))  # orthogonal: sqrt(2) * 0.7
    refused("8 x + 8 y", shelf, "steering.vectors[1].scale", limits=Limits(max_dose=1.0))
    to = {"ablate": [{"id": "x", "to": 11, "layers": [1]}]}
    refused(to, shelf, "steering.ablate[0].to", limits=Limits(max_dose=1.0))


def test_cancelling_terms_have_no_dose(shelf: Shelf) -> None:
    """Adding up the terms' sizes refuses a request whose change is nothing."""
    plan = compiled("50 x - 50 x", shelf, Limits(max_dose=0.1))
    assert plan.report["dose"] == {"1": 0.0}
    assert not added(plan).any()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"apply": {"first": 5}}, {"apply": {"after": 5}}),
        ({"apply": {"generation": False}}, {"apply": {"prompt": False}}),
        (
            {"apply": {"prompt": False, "thinking": False}},
            {"apply": {"prompt": False, "generation": False, "thinking": True}},
        ),
        ({"when": {"probe": "y", "above": 0.5}}, {"when": {"probe": "y", "below": 0.5}}),
        ({}, {"when": {"probe": "y", "above": 0.5}}),
        ({}, {"apply": {"prompt": True, "generation": True, "after": 3}}),
    ],
)
def test_terms_that_do_not_meet_do_not_cancel(shelf: Shelf, one: dict, other: dict) -> None:
    """Opposite terms in turn would pass any limit and still overdose every token."""
    if one.get("apply", {}).get("first"):  # prompt tokens get both; leave them out
        one = {"apply": {"prompt": False, **one["apply"]}}
        other = {"apply": {"prompt": False, **other["apply"]}}
    spec = {"vectors": [{"id": "x", "scale": 50, **one}, {"id": "x", "scale": -50, **other}]}
    assert compiled(spec, shelf).report["dose"] == {"1": 5.0}
    with pytest.raises(DoseError):
        compiled(spec, shelf, Limits(max_dose=1.0))


def test_terms_that_do_not_meet_do_not_add_up(shelf: Shelf) -> None:
    """Counting the first five tokens and the rest together refuses half of what is allowed."""
    early = {"id": "x", "scale": 8, "apply": {"prompt": False, "first": 5}}
    late = {"id": "x", "scale": 8, "apply": {"prompt": False, "after": 5}}
    compiled({"vectors": [early, late]}, shelf, Limits(max_dose=1.0))
    late["apply"] = {"prompt": False, "after": 4}
    with pytest.raises(DoseError):
        compiled({"vectors": [early, late]}, shelf, Limits(max_dose=1.0))


# --- fingerprints


TERMS = [
    {"id": "r0", "scale": 0.1},
    {"id": "r1", "scale": 0.3},
    {"id": "r2", "scale": -0.7},
    {"id": "r0", "scale": 0.2, "apply": {"prompt": False}},
]
ABLATIONS = [{"id": "r3"}, {"id": "r4", "scale": 0.5, "to": 0.3}]


def test_reordered_specs_share_a_fingerprint(shelf: Shelf) -> None:
    """Three rows summed in another order differ in the last bit, and then share no cache."""
    prints = {
        compiled({"vectors": list(vectors), "ablate": list(ablate)}, shelf).fingerprint
        for vectors in itertools.permutations(TERMS)
        for ablate in itertools.permutations(ABLATIONS)
    }
    assert len(prints) == 1


def test_different_content_has_another_fingerprint(shelf: Shelf) -> None:
    """A field left out of the fingerprint hands one request another's cached hidden states."""
    base = {"id": "x", "layers": [2]}
    gate = {"probe": "y", "above": 0.5}
    specs: list[dict] = [
        {"vectors": [base]},
        {"vectors": [base | {"id": "y"}]},
        {"vectors": [base | {"scale": 1.0000001}]},
        {"vectors": [base | {"layers": [3]}]},
        {"vectors": [base | {"layers": [2, 3]}]},
        {"vectors": [base | {"normalize": True}]},
        {"vectors": [base | {"apply": {"prompt": False}}]},
        {"vectors": [base | {"apply": {"first": 3}}]},
        {"vectors": [base | {"apply": {"after": 3}}]},
        {"vectors": [base | {"apply": {"thinking": False}}]},
        {"vectors": [base | {"when": gate}]},
        {"vectors": [base | {"when": gate | {"above": 0.6}}]},
        {"vectors": [base | {"when": {"probe": "y", "below": 0.5}}]},
        {"vectors": [base | {"when": gate | {"layer": 2}}]},
        {"vectors": [base | {"when": gate | {"per": "prompt"}}]},
        {"vectors": [base | {"when": gate | {"probe": "x"}}]},
        {"ablate": [base]},
        {"ablate": [base | {"scale": 0.5}]},
        {"ablate": [base | {"to": 0.5}]},
        {"vectors": [base], "ablate": [base]},
    ]
    prints = [compiled(spec, shelf).fingerprint for spec in specs]
    assert len(set(prints)) == len(specs)
    shelf["x"] = replace(shelf["x"], directions=shelf["x"].directions * 1.01)
    assert compiled(specs[0], shelf).fingerprint != prints[0]


def test_names_do_not_count(shelf: Shelf) -> None:
    """The same steering under another id, or spelt out, must share slots and cache."""
    shelf["twin"] = shelf["x"].renamed("twin")
    spelt = {"vectors": [{"id": "twin", "scale": 1.0, "layers": [1], "normalize": False}]}
    assert compiled("x", shelf).fingerprint == compiled(spelt, shelf).fingerprint


def test_generation_only_plans_leave_the_prompts_cache_alone(shelf: Shelf) -> None:
    """Forking the prompt's cache for what starts after it doubles the prefill of every request."""
    generation = {"id": "x", "apply": {"prompt": False}}
    plan = compiled({"vectors": [generation]}, shelf)
    assert plan.prompt_fingerprint is None
    assert plan.parts
    both = compiled({"vectors": [generation, {"id": "y"}]}, shelf)
    alone = compiled("y", shelf)
    assert both.prompt_fingerprint == alone.prompt_fingerprint == alone.fingerprint
    assert both.fingerprint != alone.fingerprint


# --- content


def test_scale_0_compiles_to_nothing(shelf: Shelf) -> None:
    """Zero rows would fork the cache and run the op to add nothing."""
    spec = {
        "vectors": [{"id": "x", "scale": 0}],
        "ablate": [{"id": "y", "scale": 0, "layers": [1]}],
    }
    plan = compiled(spec, shelf)
    assert (plan.parts, plan.prompt_fingerprint) == ((), None)
    assert plan.fingerprint == compiled("0 y", shelf).fingerprint
    assert [entry["scale"] for entry in plan.report["applied"]] == [0, 0]


def test_terms_with_the_same_tokens_are_summed(shelf: Shelf) -> None:
    """One row a layer, whatever the number of terms, is what keeps many vectors cheap."""
    plan = compiled("0.5 x - 2 y + 0.25 x", shelf)
    assert len(plan.parts) == 1
    assert torch.equal(added(plan), axis(0, 1.5) + axis(1, -4.0))


def test_the_receipt_says_what_was_applied(shelf: Shelf) -> None:
    """A receipt that leaves out defaults cannot be used to repeat the request."""
    report = compiled({"vectors": [{"id": "kept", "strength": 2}]}, shelf).report
    assert report["applied"] == [
        {
            "kind": "vector",
            "id": "kept",
            "scale": 2.0,
            "layers": [1],
            "digest": shelf["kept"].digest[:16],
            "normalize": True,
            "dose": {"1": 0.1},
        }
    ]
    assert (report["layers"], report["dose"]) == ([1], {"1": 0.1})


def test_a_prompt_gate_asks_for_the_whole_prompt(shelf: Shelf) -> None:
    """A prompt cut in chunks would be judged by its first chunk."""
    for per, needs in (("prompt", True), ("token", False)):
        when = {"probe": "y", "above": 0.5, "per": per}
        assert compiled({"vectors": [{"id": "x"}], "when": when}, shelf).needs_whole_prompt is needs


def test_an_additive_plan_is_the_compiled_one(shelf: Shelf) -> None:
    """Builders calibrate with one and users steer with the other."""
    plan = additive_plan({1: shelf["x"].row(1)})
    assert plan.fingerprint == compiled("x", shelf).fingerprint
    assert additive_plan({}).parts == ()


def test_a_spec_error_is_what_limits_raise(shelf: Shelf) -> None:
    """The server maps SpecError to 400; anything else of ours would be a 500."""
    with pytest.raises(SpecError):
        compiled("100 x", shelf, Limits(max_dose=0.1))


# --- what it was measured on


NVFP4 = replace(MODEL, quantization="nvfp4 gptq")


@pytest.mark.parametrize(
    ("built", "served", "says"),
    [
        (MODEL, MODEL, None),
        (NVFP4, NVFP4, None),
        (MODEL, NVFP4, ("unquantised weights", "nvfp4 gptq")),
        (NVFP4, MODEL, ("nvfp4 gptq", "unquantised weights")),
        # A GGUF says nothing of what it was made on.
        (replace(MODEL, fingerprint=None), NVFP4, None),
    ],
)
def test_other_weights_are_told(
    built: ModelRef, served: ModelRef, says: tuple[str, str] | None, shelf: Shelf
) -> None:
    """A vector of bfloat16 refused by its own model in four bits, or applied without a word."""
    shelf["q"] = made("q", axis(0), model=built)
    spec = parse_spec({"vectors": [{"id": "q"}], "ablate": [{"id": "q"}]})
    plan = compile_plan(spec, shelf, model=served, hidden_norms=NORMS, limits=FREE)
    for entry in plan.receipt["applied"]:
        told = entry.get("calibrated_on"), entry.get("served_on")
        assert told == (says or (None, None))

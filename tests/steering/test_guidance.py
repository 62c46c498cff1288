"""A request's guidance from spec to hidden states: labels, doses, windows, gates, company."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_classifier import toy_classifier

from trimtab.kernels import Goals, guide
from trimtab.steering.artifact import ModelRef
from trimtab.steering.bank import Bank
from trimtab.steering.classifier import ClassifierArtifact, SafeDose, from_bytes, to_bytes
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.errors import ArtifactError, DoseError, NotFoundError, SpecError
from trimtab.steering.plan import Plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep, Watch
from trimtab.steering.vector import VectorArtifact

WIDTH, N_LAYERS = 16, 3
MODEL = ModelRef("toy", "f" * 64, "llama", WIDTH, N_LAYERS)
NORMS = torch.tensor([4.0, 5.0, 8.0])
LABELS = ("casual", "expert", "concise")
TOWARD = {"classifier": "tone", "target": ["expert"]}


class Shelf:
    """Two classifiers, `tone` at layers 1 and 2 and `mood` at 1, and a vector `kind`."""

    def __init__(self) -> None:
        tone = toy_classifier(MODEL, layers=(1, 2), labels=LABELS)
        exact = SafeDose(("expert",), ("casual",), False, False, 0.35)
        turned = SafeDose((), ("casual",), False, True, 0.8)
        self.tone = replace(tone, default_layers=(1,), doses=(*tone.doses, exact, turned))
        self.mood = toy_classifier(MODEL, id="mood", labels=("glad", "sad"), layers=(1,), seed=5)

    def classifier(self, name: str, *, param: str | None = None) -> ClassifierArtifact:
        if name not in ("tone", "mood"):
            raise NotFoundError(f"Unknown classifier {name!r}.", param=param)
        found: ClassifierArtifact = getattr(self, name)
        return found

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        rows = torch.randn(N_LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
        probe = torch.tensor([[0.5, 0.1]]).repeat(N_LAYERS, 1)
        return VectorArtifact(
            id=name, model=MODEL, layers=(0, 1, 2), directions=rows, default_layers=(1,),
            method="caa", probe=probe, probe_layer=0,
        )  # fmt: skip


SHELF = Shelf()


def compiled(spec: Any, *, max_dose: float | None = None, norms: torch.Tensor = NORMS) -> Plan:
    return compile_plan(
        parse_spec(spec), SHELF, model=MODEL, hidden_norms=norms, limits=Limits(max_dose=max_dose)
    )


def guided(**more: Any) -> dict[str, Any]:
    return {"guidance": [TOWARD | more]}


def states(n: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def bank() -> Bank:
    return Bank(n_layers=N_LAYERS, hidden_size=WIDTH)


def passed(step: SteerStep, hidden: torch.Tensor) -> torch.Tensor:
    for layer in range(N_LAYERS):
        hidden = step.apply(layer, hidden)
    step.finish()
    return hidden


def steered(spec: Any, hidden: torch.Tensor, *, n_prompt: int = 0) -> torch.Tensor:
    own = bank()
    lease = own.acquire(compiled(spec))
    assert lease is not None
    span = Span(len(hidden), 0, SteeredRequest(lease, n_prompt))
    return passed(SteerStep(own, [span]), hidden)


def by_hand(hidden: torch.Tensor, sizes: list[float], *, toward: str, away: str | None = None):
    n = len(hidden)
    marks = torch.zeros(2, n, len(LABELS), dtype=torch.bool)
    marks[0, :, LABELS.index(toward)] = True
    if away is not None:
        marks[1, :, LABELS.index(away)] = True
    no = torch.zeros(n, dtype=torch.bool)
    goals = Goals(marks[0], marks[1], torch.tensor([sizes] * n), no, torch.full((n,), 2.0), no)
    return guide(hidden, SHELF.tone.at(1), goals)


def test_scale_1_is_the_calibrated_dose_of_these_labels() -> None:
    """A dose of another label set, or in units of one token's norm instead of the layer's."""
    hidden = states(4)
    got = steered(guided(), hidden)
    assert torch.allclose(got, by_hand(hidden, [0.2 * 5.0], toward="expert"), atol=1e-6)
    exact = compiled(guided(avoid=["casual"])).report["applied"][0]
    assert (exact["dose"], exact["calibrated_for_these_labels"]) == ({"1": 0.35}, True)
    other = compiled(guided(avoid=["concise"])).report["applied"][0]
    assert (other["dose"], other["calibrated_for_these_labels"]) == ({"1": 0.2}, False)


def test_steps_share_the_dose() -> None:
    """Three steps of the whole dose each are three doses: far over the cliff."""
    hidden = states(4)
    got = steered(guided(steps=3, decay=0.5, avoid=["casual"]), hidden)
    sizes = [0.35 * 5.0 * w / 1.75 for w in (1.0, 0.5, 0.25)]
    want = by_hand(hidden, sizes, toward="expert", away="casual")
    assert torch.allclose(got, want, atol=1e-5)


def test_terms_act_one_after_the_other_on_what_vectors_made() -> None:
    """Guidance computed on the unsteered state undoes or doubles what vectors did."""
    hidden = states(5)
    spec = {"vectors": [{"id": "kind", "scale": 0.5}], "guidance": [TOWARD]}
    added = hidden + 0.5 * SHELF.vector("kind").row(1)
    want = by_hand(added, [1.0], toward="expert")
    assert torch.allclose(steered(spec, hidden), want, atol=1e-5)
    both = {"guidance": [TOWARD | {"scale": 0.5}, TOWARD | {"scale": 0.5, "target": ["casual"]}]}
    first = by_hand(hidden, [0.5], toward="expert")
    second = by_hand(first, [0.5], toward="casual")
    assert torch.allclose(steered(both, hidden), second, atol=1e-5)


def test_windows_and_gates_hold_for_guidance() -> None:
    """Guidance that ignores `apply` or a shut gate."""
    hidden = states(6)
    got = steered(guided(apply={"prompt": False}), hidden, n_prompt=4)
    assert torch.equal(got[:4], hidden[:4])
    assert not torch.equal(got[4:], hidden[4:])
    p = torch.sigmoid(hidden @ SHELF.vector("kind").row(0) * 0.5 /
                      SHELF.vector("kind").row(0).norm() + 0.1)  # fmt: skip
    limit = float(p.median())
    gate = {"probe": "kind", "above": limit, "layer": 0}
    got = steered(guided(when=gate), hidden)
    for t in range(6):
        assert torch.equal(got[t], hidden[t]) == (float(p[t]) <= limit), t
    label = {"probe": "tone/casual", "below": 0.0}
    assert torch.equal(steered(guided(when=label), hidden), hidden)


def test_requests_of_one_pass_keep_their_own_goals() -> None:
    """Rows of the goals' table mixed up between requests, classifiers, or turns."""
    specs: list[Any] = [
        guided(), guided(target=["casual"], steps=4), None, guided(avoid=["casual"], steps=2),
        {"guidance": [TOWARD, {"classifier": "mood", "target": ["glad"]}]},
        {"guidance": [{"classifier": "mood", "avoid": ["sad"]}, TOWARD | {"loss": "sigmoid"}]},
        {"vectors": [{"id": "kind"}]}, guided(normalize=True, until=0.6),
        {"guidance": [{"classifier": "tone", "avoid": ["casual"], "reflect": True}]},
        guided(apply={"prompt": False}),
    ]  # fmt: skip
    own = bank()
    spans, wanted, parts = [], [], []
    for i, spec in enumerate(specs):
        hidden = states(3 + i, seed=i)
        request = None
        if spec is not None:
            lease = own.acquire(compiled(spec))
            assert lease is not None
            request = SteeredRequest(lease, n_prompt=2)
        spans.append(Span(len(hidden), 0, request))
        wanted.append(hidden if spec is None else steered(spec, hidden, n_prompt=2))
        parts.append(hidden)
    got = passed(SteerStep(own, spans), torch.cat(parts))
    assert torch.allclose(got, torch.cat(wanted), atol=1e-5)
    assert torch.equal(got[7:12], parts[2])
    for span in spans:
        if span.request is not None:
            own.release(span.request.lease)
    assert (own.n_live, len(own.readers), own.goals.n_free) == (0, 0, own.max_guides)
    assert not own.guides
    assert not own.has_guides.any()


def test_a_full_table_makes_the_request_wait() -> None:
    """A guide that finds no row must not be dropped, nor half of it kept."""
    small = Bank(n_layers=N_LAYERS, hidden_size=WIDTH, max_guides=2)
    first = small.acquire(compiled({"guidance": [TOWARD | {"scale": 0.5}] * 2}))
    assert first is not None
    assert small.acquire(compiled(guided(target=["casual"]))) is None
    assert len(small.readers) == 1
    small.release(first)
    assert small.acquire(compiled(guided(target=["casual"]))) is not None
    three = [TOWARD | {"scale": 0.1}, TOWARD | {"scale": 0.2}, TOWARD | {"scale": 0.3}]
    with pytest.raises(SpecError, match="guides"):
        small.check_fits(compiled({"guidance": three}))


def test_scale_0_has_no_part() -> None:
    """A slot, a hook and a cast for a request that asks for nothing."""
    plan = compiled(guided(scale=0))
    assert plan.parts == ()
    assert plan.report["applied"][0]["dose"] == {"1": 0.0}


def test_equal_guidance_has_an_equal_fingerprint() -> None:
    """The prefix cache shares by fingerprint: what differs must differ in it."""
    changes: list[dict[str, Any]] = [
        {}, {"target": ["casual"]}, {"avoid": ["concise"]}, {"avoid_rival": True}, {"steps": 2},
        {"steps": 2, "decay": 0.9}, {"loss": "softmax"}, {"until": 0.9}, {"normalize": True},
        {"scale": 0.5}, {"apply": {"prompt": False}}, {"classifier": "mood", "target": ["glad"]},
    ]  # fmt: skip
    prints = [compiled(guided(**change)).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert compiled(guided(scale=1.0)).fingerprint == prints[0]
    assert compiled(guided(apply={"prompt": False})).prompt_fingerprint is None


def test_naming_a_classifier_twice_is_not_twice_the_dose() -> None:
    """Two terms at the calibrated dose each walk past the cliff together."""
    with pytest.raises(DoseError) as found:
        compiled({"guidance": [TOWARD, TOWARD | {"target": ["casual"], "scale": 0.1}]})
    assert found.value.param == "steering.guidance[1].scale"
    compiled({"guidance": [TOWARD, {"classifier": "mood", "target": ["glad"]}]})


def test_the_servers_limit_counts_guidance() -> None:
    """A dose limit that sees vectors only."""
    over = guided(dose=0.9, over_dose=True)
    assert compiled(over, max_dose=1.0).report["dose"] == {"1": 0.9}
    with pytest.raises(DoseError) as found:
        compiled(over, max_dose=0.8)
    assert found.value.param == "steering.guidance[0].dose"
    length = float(SHELF.vector("kind").row(1).norm()) / 5.0
    both = compiled({**guided(), "vectors": [{"id": "kind"}]})
    assert both.report["dose"]["1"] == pytest.approx(0.2 + length, abs=1e-5)


def test_an_uncalibrated_classifier_asks_for_a_dose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default dose for a classifier nobody measured is a guess at where text breaks."""
    monkeypatch.setattr(SHELF, "tone", replace(SHELF.tone, doses=()))
    with pytest.raises(DoseError, match="calibrate"):
        compiled(guided())
    with pytest.raises(DoseError):
        compiled(guided(dose=0.1))
    receipt = compiled(guided(dose=0.1, over_dose=True)).report["applied"][0]
    assert (receipt["over_dose"], receipt["scale"]) == (True, None)
    assert json.dumps(receipt)


def test_probes_read_the_last_token_of_each_span() -> None:
    """Readings handed to the wrong request, or taken after the layer's own guidance."""
    own = bank()
    lease = own.acquire(compiled(guided()))
    assert lease is not None
    from trimtab.steering.lookup import Lookup

    lookup = Lookup(SHELF, MODEL, N_LAYERS)
    readers = tuple(lookup.probe(name, path="probes[0]") for name in ("tone", "mood"))
    for reader in readers:
        own.readers.hold(reader)
    watches = [Watch(readers), Watch(readers[1:]), Watch(readers)]
    hidden = states(9)
    spans = [
        Span(4, 0, SteeredRequest(lease, 4), watch=watches[0]),
        Span(2, 7, watch=watches[1]),
        Span(3, 0, watch=watches[2]),
    ]
    passed(SteerStep(own, spans), hidden)
    for watch, at, which in ((0, 3, 0), (1, 5, 1), (2, 8, 0)):
        artifact = (SHELF.tone, SHELF.mood)[which]
        network = artifact.at(1)
        z = (hidden[at] @ network.w_in.T + network.b_in).relu()
        z = (z @ network.w_mid.T + network.b_mid).relu()
        want = (z @ network.w_out.T + network.b_out).softmax(0)
        assert watches[watch].latest[0] == pytest.approx(want.tolist(), abs=1e-5)
    assert lookup.probe("kind", path="probes[0]").labels == ("kind",)


def test_saved_then_loaded_is_the_same(tmp_path: Any) -> None:
    """A tensor, a dose or a fact that does not survive the file."""
    back = from_bytes(to_bytes(SHELF.tone), name="tone")
    assert back.digest == SHELF.tone.digest
    assert json.loads(json.dumps(back.card())) == json.loads(json.dumps(SHELF.tone.card()))
    assert [d.dose for d in back.doses] == [d.dose for d in SHELF.tone.doses]
    assert torch.equal(back.at(2).w_in, SHELF.tone.at(2).w_in)
    linear = toy_classifier(MODEL, hidden=0)
    assert from_bytes(to_bytes(linear), name="x").at(1).w_mid is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": ("a", "a", "b")}, "different"),
        ({"labels": ("a", "b/c", "d")}, "label"),
        ({"labels": ("a", "b")}, "w_out"),
        ({"layers": (1, 7)}, "layer 7"),
        ({"default_layers": (0,)}, "default"),
        ({"b_mid": None}, "hidden layer"),
        ({"w_in": torch.full((2, 8, WIDTH), torch.nan)}, "NaN"),
        ({"w_in": torch.zeros(2, 8, WIDTH, dtype=torch.float64)}, "float64"),
        ({"doses": (SafeDose(("nobody",), (), False, False, 0.1),)}, "nobody"),
        ({"doses": (SafeDose(("expert",), (), False, False, float("nan")),)}, "nan"),
    ],
)
def test_an_inconsistent_classifier_is_refused(changes: dict[str, Any], reason: str) -> None:
    """A file whose tensors and header disagree fails in the middle of a batch."""
    with pytest.raises(ArtifactError, match=reason):
        replace(SHELF.tone, **changes)

"""How far a classifier may steer: found for each label set, at just its own plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toy_chat import toy_chat
from toy_classifier import toy_classifier

from trimtab.steering.classifier import ClassifierArtifact, SafeDose
from trimtab.steering.errors import DataError
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Guide, Plan
from trimtab.training.classifiers import doses
from trimtab.training.classifiers.doses import (
    DoseBudget,
    LabelSet,
    calibrate_doses,
    default_label_sets,
    plan_at,
)
from trimtab.training.coherence import Coherence
from trimtab.training.steered_model import SteeredModel

LABELS = ("casual", "expert", "concise")
CASUAL, EXPERT = LabelSet(target=("casual",)), LabelSet(target=("expert",))
BUDGET = DoseBudget(n_prompts=20, n_tokens=8)


@pytest.fixture(autouse=True)
def looping_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy of random weights loops on every question."""
    monkeypatch.setattr("trimtab.training.coherence.MAX_REPETITION", 1.0)


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    loaded = toy_chat()
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    return SteeredModel(loaded, profile)


@pytest.fixture(scope="module")
def classifier(host: SteeredModel) -> ClassifierArtifact:
    made = toy_classifier(host.profile.ref, labels=LABELS)
    return replace(made, doses=(SafeDose((), ("expert",), True, False, 0.7),))


def guide_of(plan: Plan) -> Guide:
    (guide,) = (one for term in plan.parts[0].layers.values() for one in term.guides)
    return guide


def breaking_at(
    monkeypatch: pytest.MonkeyPatch, host: SteeredModel, **bounds: float
) -> list[float]:
    """Let generations fall apart past a relative dose of each first target (or `reflected`)."""
    norm = float(host.profile.hidden_norms[1])
    asked: list[float] = []

    def share(self: Coherence, host: Any, prompts: Any, plan: Plan, **_: Any) -> float:
        guide = guide_of(plan)
        reflects = guide.step == "reflect"
        dose = sum(guide.sizes) / (1.0 if reflects else norm)
        asked.append(dose)
        key = "reflected" if reflects else LABELS[(guide.toward or guide.away)[0]]
        return float(dose > bounds[key])

    monkeypatch.setattr(Coherence, "incoherent_share", share)
    return asked


def test_each_set_gets_its_own_dose(host, classifier, monkeypatch):
    """A dose found for one label set and written down for another."""
    breaking_at(monkeypatch, host, casual=0.31, expert=0.9, concise=0.05, reflected=0.6)
    sets = [CASUAL, EXPERT, LabelSet(avoid=("concise",)),
            LabelSet(avoid=("casual",), is_reflection=True)]  # fmt: skip
    found = calibrate_doses(host, classifier, label_sets=sets, budget=BUDGET)
    by_set = {(d.target, d.avoid, d.is_reflection): d.dose for d in found.doses}
    assert 0.2 < by_set[("casual",), (), False] <= 0.31
    assert 0.3 < by_set[("expert",), (), False] <= 0.9
    assert 0 < by_set[(), ("concise",), False] <= 0.05
    assert by_set[(), ("casual",), True] == 0.5
    assert found.safe_dose((), ("expert",), picks_rival=True) == (0.7, True)  # kept
    assert found.safe_dose(("casual", "expert"), ()) == (min(
        d.dose for d in found.doses if not d.is_reflection), False)  # fmt: skip
    record = found.calibration
    assert record is not None
    assert [len(one["curve"]) > 0 for one in record["label_sets"]] == [True] * 4


def test_a_set_is_measured_anew(host, classifier, monkeypatch):
    """Calibrating twice leaves two doses of one set, of which the older is found first."""
    for bound in (0.3, 0.1):
        breaking_at(monkeypatch, host, casual=bound)
        classifier = calibrate_doses(host, classifier, label_sets=[CASUAL], budget=BUDGET)
    mine = [d.dose for d in classifier.doses if d.target == ("casual",)]
    assert len(mine) == 1
    assert mine[0] <= 0.1


def test_nothing_is_safe(host, classifier, monkeypatch):
    """A model that any dose breaks must not get the smallest dose tried."""
    breaking_at(monkeypatch, host, casual=0.0, reflected=0.0)
    sets = [CASUAL, LabelSet(avoid=("casual",), is_reflection=True)]
    found = calibrate_doses(host, classifier, label_sets=sets, budget=BUDGET)
    assert [d.dose for d in found.doses[1:]] == [0.0, 0.0]


def test_what_cannot_be_calibrated_is_refused(host, classifier, monkeypatch):
    """Questions that the unsteered model fails already let every dose fail, unsaid."""
    monkeypatch.setattr("trimtab.training.coherence.MAX_REPETITION", -1.0)
    with pytest.raises(DataError, match="answers only 0 of 64"):
        calibrate_doses(host, classifier, label_sets=[CASUAL], budget=BUDGET)
    with pytest.raises(DataError, match="nobody"):
        calibrate_doses(host, classifier, label_sets=[LabelSet(avoid=("nobody",))])


def test_the_plan_is_the_requests(host, classifier):
    """Calibration by another op than requests go through measures nothing."""
    guide = guide_of(plan_at(host, classifier, LabelSet(("casual",), ("expert",)), 0.4, n_steps=2))
    assert (guide.toward, guide.away, guide.step) == ((0,), (1,), "unit")
    assert sum(guide.sizes) == pytest.approx(0.4 * float(host.profile.hidden_norms[1]))
    turned = guide_of(plan_at(host, classifier, LabelSet((), ("expert",), False, True), 0.5))
    assert (turned.sizes, turned.step) == ((0.5,), "reflect")


def test_default_sets_cover_each_label_three_ways():
    """A label that nothing was measured for borrows the smallest dose of the others."""
    sets = default_label_sets(LABELS)
    assert len(set(sets)) == 9
    assert len(default_label_sets(LABELS, with_pairs=True)) == 12


def test_generations_decide(host, classifier):
    """The way from a dose to generations, with nothing replaced: more dose never passes later."""
    found = calibrate_doses(host, classifier, label_sets=[CASUAL], budget=BUDGET)
    dose = found.safe_dose(("casual",), ())
    assert dose is not None
    assert 0 <= dose[0] <= doses._HIGH
    assert found.digest != classifier.digest  # the doses are part of what steering reads

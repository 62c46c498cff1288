"""Builds in a running server: what they make, beside whom, how they end and what they leave."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build_wire import CLASSIFIER, PAIRS, PATH, TEXTS, VECTOR, Held, built, ended, started
from build_wire import state as state_of
from running_server import Served

from trimtab.steering.errors import DataError
from trimtab.training.classifiers.build import build_classifier
from trimtab.training.classifiers.readers import labelled_texts
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.pairs import concept, pair_set

FROM_WORDS = {k: v for k, v in VECTOR.items() if k != "pairs"} | {
    "describe": "warm",
    "against": "cold",
}
BUNDLED = {k: v for k, v in CLASSIFIER.items() if k != "texts"} | {
    "bundled": "tone",
    "own_answer_tokens": 2,
}


def host_of(served: Served, *, slice_tokens: int | None = 256) -> SteeredModel:
    """The served model, read in passes as large as the server's."""
    engine = served.engine
    return SteeredModel(engine.loaded, engine.profile, slice_tokens=slice_tokens)


def pairs(*more: dict[str, Any]) -> Any:
    return pair_set(((f"pairs[{i}]", row) for i, row in enumerate([*PAIRS, *more])), name="pairs")


def n_hooks(served: Served) -> int:
    modules = served.engine.loaded.model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("mean_difference", {}),
        ("pca", {"pairing": "diff"}),
        ("logistic", {"c": 1}),
        ("mass_mean", {}),
        ("grains", {"k": 1, "attribution": "kernel_shap", "read": "answer"}),
    ],
)
def test_a_vector_is_what_the_builder_builds(
    serve_toy: Callable[..., Served], method: str, params: dict[str, Any]
) -> None:
    """Catches an option that is dropped on the way, and numbers that the slices change."""
    served = serve_toy()
    card = built(served, VECTOR, method=method, params=params, position=-2, description="Mine")
    ours = served.store.vector("made")
    direct = build_vector(
        host_of(served),
        pairs(),
        id="made",
        method=method,
        options=params,
        position=-2,
        is_calibrated=False,
        description="Mine",
    )
    assert torch.equal(ours.directions, direct.directions)
    assert ours.probe is not None
    assert direct.probe is not None
    assert torch.equal(ours.probe, direct.probe)
    for name in ("settings", "data", "method", "default_layers", "description", "probe_layer"):
        assert getattr(ours, name) == getattr(direct, name)
    assert card == served.http.get("/v1/steering/vectors/made").json()


def test_a_calibrated_vector_is_what_the_builder_builds(serve_toy: Callable[..., Served]) -> None:
    """Catches a calibration, or a map, that runs otherwise in a server, and a long text read in one
    pass, for whose end chats would wait."""
    served = serve_toy()
    long = {"prompt": "Why?" * 60, "preferred": "Fine. " * 30, "dispreferred": "Bad! " * 30}
    sizes: list[int] = []

    def note(module: Any, args: Any, given: dict[str, Any]) -> None:
        sizes.append(given["input_ids"].numel())

    model = served.engine.loaded.model.base_model
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    card = built(served, VECTOR, calibrate=True, map=True, normalize=True, pairs=[*PAIRS, long])
    handle.remove()
    assert 128 < max(sizes) <= 256
    direct = build_vector(host_of(served), pairs(long), id="made", is_mapped=True, normalize=True)
    ours = served.store.vector("made")
    assert torch.equal(ours.directions, direct.directions)
    assert ours.calibration == direct.calibration
    assert card["calibration"]["curve"]
    assert card["normalize"] is True


def test_a_classifier_is_what_the_builder_builds(serve_toy: Callable[..., Served]) -> None:
    """Catches an option that is dropped on the way, and numbers that the slices change."""
    served = serve_toy()
    card = built(served, CLASSIFIER, layers=[1], network="linear", position="both", seed=3)
    direct = build_classifier(
        host_of(served),
        labelled_texts(((f"texts[{i}]", row) for i, row in enumerate(TEXTS)), name="texts"),
        id="made",
        layers=[1],
        kind="linear",
        hidden=8,
        position="both",
        seed=3,
    )
    ours = served.store.classifier("made")
    assert torch.equal(ours.w_in, direct.w_in)
    assert torch.equal(ours.b_in, direct.b_in)
    assert (ours.metrics, ours.settings, ours.data) == (
        direct.metrics,
        direct.settings,
        direct.data,
    )
    assert card == served.http.get("/v1/steering/classifiers/made").json()


def test_it_steers_at_once(serve_toy: Callable[..., Served]) -> None:
    """Catches a vector that needs a restart, or one that the next request does not find."""
    served = serve_toy()
    assert served.chat(steering="made").status_code == 404
    plain = served.chat(logprobs=True).json()["choices"]
    built(served, VECTOR)
    built(served, CLASSIFIER)
    answer = served.chat(steering="3 made", probes=["made"], logprobs=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["layers"]
    assert answer.json()["choices"][0]["logprobs"] != plain[0]["logprobs"]


@pytest.mark.parametrize("body", [VECTOR | {"calibrate": True}, CLASSIFIER])
def test_progress_rises(serve_toy: Callable[..., Served], body: dict[str, Any]) -> None:
    """Catches a bar that falls back, or runs past its end."""
    served = serve_toy()
    server = served.app.state.server
    told: list[tuple[str, int, int]] = []
    submit = server.builds._queue.submit

    def watched(work: Any, access: Any) -> Any:
        def told_work(slices: Any, progress: Any) -> Any:
            def tell(*step: Any) -> None:
                told.append(step)
                progress(*step)

            return work(slices, tell)

        return submit(told_work, access)

    server.builds._queue.submit = watched
    built(served, body)
    for stage in {step[0] for step in told}:
        done = [step[1] for step in told if step[0] == stage]
        assert done == sorted(done), stage
    assert all(0 <= done <= total for _, done, total in told)
    assert told[-1][0] == "storing"
    assert {"reading hidden states"} < {step[0] for step in told}


def test_chats_are_the_same_beside_a_build(serve_toy: Callable[..., Served]) -> None:
    """Catches hooks or plans of a build that reach a neighbour's forward pass, or chats that wait
    for its end."""
    served = serve_toy()
    built(served, VECTOR, id="kind")
    asked = {"n": 3, "temperature": 0.8, "seed": 5, "max_tokens": 24, "logprobs": True}
    plain = served.chat(**asked).json()["choices"]
    steered = served.chat(**asked, steering="2 kind").json()["choices"]
    id = started(served, VECTOR | {"calibrate": True})
    served.until(lambda: state_of(served, id)["stage"] == "choosing layers", within_s=60)
    # One at a time: a batch of other rows rounds otherwise.
    for _ in range(3):
        assert served.chat(**asked).json()["choices"] == plain
        assert served.chat(**asked, steering="2 kind").json()["choices"] == steered
    assert state_of(served, id)["status"] == "running"
    served.http.delete(f"{PATH}/{id}")
    assert ended(served, id)["status"] == "cancelled"


@pytest.mark.parametrize(
    ("stage", "body"),
    [
        ("writing the pairs", FROM_WORDS),
        ("attributing prompts", VECTOR | {"method": "grains"}),
        ("reading hidden states", VECTOR),
        ("finding directions", VECTOR | {"method": "logistic"}),
        ("choosing layers", VECTOR | {"calibrate": True}),
        ("measuring the curve", VECTOR | {"calibrate": True}),
        ("mapping layers and scales", VECTOR | {"calibrate": True, "map": True}),
        ("answering", BUNDLED),
        ("reading hidden states", CLASSIFIER),
        ("training", CLASSIFIER),
        ("finding doses", CLASSIFIER | {"calibrate": True}),
    ],
)
def test_it_can_be_cancelled_in_every_stage(
    serve_toy: Callable[..., Served], stage: str, body: dict[str, Any]
) -> None:
    """Catches a stage that cannot be left, what it leaves in the model, and half a result kept."""
    served = serve_toy()
    before = served.chat(logprobs=True).json()["choices"]
    kind = body["kind"]
    built(served, VECTOR if kind == "vector" else CLASSIFIER, method=None, description="old")
    old = getattr(served.store, kind)("made").digest
    with Held(stage) as held:
        id = started(served, body, overwrite=True)
        held.reached()
        now = state_of(served, id)
        assert (now["status"], now["stage"]) == ("running", stage)
        answer = served.http.delete(f"{PATH}/{id}")
        assert answer.status_code == 200
        assert answer.json()["status"] == "running"
    last = ended(served, id)
    assert (last["status"], last["stage"]) == ("cancelled", stage)
    assert last["result"] is last["error"] is None
    assert getattr(served.store, kind)("made").digest == old
    assert n_hooks(served) == 0
    assert served.chat(logprobs=True).json()["choices"] == before


@pytest.mark.parametrize(
    ("error", "status_code", "words"),
    [
        (DataError("No direction.", param="pairs"), "invalid_data", "No direction."),
        (ZeroDivisionError("secret"), "internal_error", "log"),
    ],
)
def test_a_failure_leaves_the_store_as_it_was(
    serve_toy: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status_code: str,
    words: str,
) -> None:
    """Catches a vector lost to a build that failed, a queue that stops, and insides laid open."""
    served = serve_toy()
    built(served, VECTOR)
    old = served.store.vector("made").digest
    made: list[Any] = []

    def fail(host: SteeredModel, *args: Any, **options: Any) -> Any:
        made.append(weakref.ref(host))
        host.run(lambda: host.model(input_ids=torch.tensor([[5, 6]])))
        raise error

    monkeypatch.setattr("trimtab.serving.vector_build.build_vector", fail)
    last = ended(served, started(served, VECTOR, overwrite=True))
    assert (last["status"], last["result"]) == ("failed", None)
    assert last["error"]["code"] == status_code
    assert words in last["error"]["message"]
    assert "secret" not in last["error"]["message"]
    assert served.store.vector("made").digest == old
    assert n_hooks(served) == 0
    error.__traceback__ = None  # our own hold on its frames; what is logged, pytest holds

    def gone() -> bool:
        gc.collect()
        return made[0]() is None

    if isinstance(error, DataError):
        served.until(gone)
    monkeypatch.undo()
    assert built(served, VECTOR, overwrite=True)["id"] == "made"


def test_a_pass_that_fails_takes_its_hooks_out(
    serve_toy: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches captures or steering that a crash inside the model leaves behind."""
    served = serve_toy()
    norm, n = served.engine.loaded.model.model.norm, threading.Semaphore(30)
    forward = norm.forward

    def crash(*args: Any, **options: Any) -> Any:
        is_building = n_hooks(served) > 0
        if is_building and not n.acquire(blocking=False):
            raise RuntimeError("the model crashed")
        return forward(*args, **options)

    monkeypatch.setattr(norm, "forward", crash)
    last = ended(served, started(served, VECTOR, calibrate=True))
    assert (last["status"], last["error"]["code"]) == ("failed", "internal_error")
    assert n_hooks(served) == 0
    assert not served.store.has_vector("made")


def test_a_classifier_without_doses_is_stored_and_said_to_be(
    serve_toy: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches training that is lost because the model could not be calibrated, or silence."""
    served = serve_toy()

    def fail(*args: Any, **options: Any) -> Any:
        raise DataError("It falls apart unsteered.")

    monkeypatch.setattr("trimtab.serving.classifier_build.calibrate_doses", fail)
    last = ended(served, started(served, CLASSIFIER, calibrate=True))
    assert last["status"] == "done"
    assert last["error"]["code"] == "not_calibrated"
    assert "falls apart" in last["error"]["message"]
    assert last["result"]["calibration"] is None
    assert served.store.classifier("made").doses == ()


def test_attnlrp_is_not_used_where_it_is_not_offered(serve_toy: Callable[..., Served]) -> None:
    """Catches a build that takes the method an operator has left out."""
    served = serve_toy(attnlrp=False)
    built(served, VECTOR, method="grains", pairs=PAIRS[:12])
    assert served.store.vector("made").settings["attribution"] == "kernel_shap"
    body = VECTOR | {"method": "grains", "params": {"attribution": "attnlrp"}, "id": "other"}
    refused = served.http.post(PATH, json=body)
    assert refused.json()["error"]["param"] == "params.attribution"


@pytest.mark.parametrize("stage", ["reading hidden states", "training"])
def test_stopping_the_server_ends_a_build(serve_toy: Callable[..., Served], stage: str) -> None:
    """Catches a shutdown that waits for a build, or a thread left behind."""
    served = serve_toy()
    with Held(stage) as held:
        started(served, CLASSIFIER | {"calibrate": True})
        started(served, VECTOR)
        held.reached()
        served.server.should_exit = True
        # Its jobs are cancelled before the held one may go on.
        builds = served.app.state.server.builds
        served.until(
            lambda: all(
                one._job is None or one._job._cancelled.is_set() for one in builds._all.values()
            )
        )
    names = ("trimtab-engine", "trimtab-build")
    served.until(
        lambda: not [t for t in threading.enumerate() if t.name.startswith(names)], within_s=20
    )
    assert not served.store.has_classifier("made")
    assert not served.store.has_vector("made")


@pytest.mark.slow
def test_the_real_model_builds_beside_chats(real_server: Served) -> None:
    """Catches what a toy cannot show: another dtype, a long vocabulary, a template of its own."""
    some = concept("warm").build[:12]
    rows = [
        {
            "prompt": p.prompt * (1 if i else 40),  # the first is too long for one pass
            "preferred": p.preferred,
            "dispreferred": p.dispreferred,
            "split": "build",
        }
        for i, p in enumerate(some)
    ]
    asked = {"model": "smollm2", "max_tokens": 12}
    plain = real_server.chat(**asked).json()["choices"]
    id = started(real_server, VECTOR | {"id": "built", "pairs": rows})
    beside = real_server.chat(**asked).json()["choices"]
    assert ended(real_server, id)["status"] == "done"
    try:
        ours = real_server.store.vector("built")
        data = pair_set(((f"pairs[{i}]", row) for i, row in enumerate(rows)), name="pairs")
        direct = build_vector(host_of(real_server), data, id="built", is_calibrated=False)
        assert torch.equal(ours.directions, direct.directions)
        # Other passes group other rows, and a matrix product rounds by its shape.
        large = build_vector(
            host_of(real_server, slice_tokens=None), data, id="built", is_calibrated=False
        )
        assert torch.allclose(ours.directions, large.directions, rtol=1e-3, atol=1e-4)
        assert real_server.chat(**asked, steering="built").status_code == 200
        assert beside == plain
    finally:
        real_server.store.delete_vector("built")

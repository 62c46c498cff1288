"""Builds over HTTP as tests ask for them: small data, waiting, and a stage to be held at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from running_server import Served

from trimtab.serving.jobs import Job

PATH = "/v1/steering/builds"
PAIRS = [
    {"prompt": f"Day {i}?", "preferred": f"Fine day {i}.", "dispreferred": f"Bad one, {i}!"}
    for i in range(16)
]
TEXTS = [
    {"text": f"{word} {i}", "prompt": f"Q{i}?", "label": label}
    for i in range(16)
    for label, word in (("kind", "fine"), ("curt", "no"))
]
VECTOR: dict[str, Any] = {"kind": "vector", "id": "made", "pairs": PAIRS, "calibrate": False}
CLASSIFIER: dict[str, Any] = {
    "kind": "classifier",
    "id": "made",
    "texts": TEXTS,
    "hidden": 8,
    "calibrate": False,
}


def post(served: Served, body: dict[str, Any], **fields: Any) -> httpx.Response:
    return served.http.post(PATH, json=body | fields)


def state(served: Served, id: str) -> dict[str, Any]:
    answer = served.http.get(f"{PATH}/{id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def started(served: Served, body: dict[str, Any], **fields: Any) -> str:
    answer = post(served, body, **fields)
    assert answer.status_code == 202, answer.text
    id: str = answer.json()["id"]
    assert answer.headers["location"] == f"{PATH}/{id}"
    return id


def ended(served: Served, id: str) -> dict[str, Any]:
    """Wait for a build's end and return its last state."""
    over = ("done", "failed", "cancelled")
    served.until(lambda: state(served, id)["status"] in over, within_s=120)
    return state(served, id)


def built(served: Served, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Build it, and return the stored artifact's card."""
    last = ended(served, started(served, body, **fields))
    assert last["status"] == "done", last
    assert last["error"] is None
    card: dict[str, Any] = last["result"]
    return card


class Held:
    """Jobs that stop at the first step of a stage until they may go on."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.is_reached = threading.Event()
        self.may_go = threading.Event()

    def __enter__(self) -> Held:
        self._patch = pytest.MonkeyPatch()
        run = Job.run

        def held(job: Job[Any], access: Any, tell: Callable[[str, int, int], None]) -> Any:
            def wait(stage: str, done: int, total: int) -> None:
                tell(stage, done, total)
                if stage == self.stage and not self.may_go.is_set():
                    self.is_reached.set()
                    assert self.may_go.wait(60)

            return run(job, access, wait)

        self._patch.setattr(Job, "run", held)
        return self

    def __exit__(self, *error: object) -> None:
        self.may_go.set()
        self._patch.undo()

    def reached(self) -> None:
        assert self.is_reached.wait(60), f"no build got to {self.stage!r}"

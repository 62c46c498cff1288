"""What does not fit into memory is refused, and nothing else is lost with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running_server import NAME, Served

from trimtab.attribution import subject

BODY = {"model": NAME, "messages": [{"role": "user", "content": "Why?"}], "target": "so"}


def test_a_gradient_without_room_is_refused(
    serve_toy: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a server that is killed by the system for want of memory."""
    served = serve_toy()
    with monkeypatch.context() as patch:
        patch.setattr(subject, "free_bytes", lambda device: 1000)
        answer = served.http.post("/v1/attributions", json=BODY)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "attribution_too_large"
    assert served.http.post("/v1/attributions", json=BODY).status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_runs_out_fails_one_request(
    serve_toy: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Catches a model thread that dies with the first failed allocation."""
    served = serve_toy()

    def fail(*args: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", fail)
        answer = served.http.post("/v1/attributions", json=BODY)
        assert answer.status_code == 413
    assert served.http.post("/v1/attributions", json=BODY).status_code == 200
    assert served.chat().status_code == 200


def test_other_failures_stay_what_they_are(
    serve_toy: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches every fault passed off as a lack of memory, and its insides told to a client."""
    served = serve_toy()

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret insides")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    answer = served.http.post("/v1/attributions", json=BODY)
    assert answer.status_code == 500
    assert "secret" not in answer.text

"""How a worker measures the |h| of a text, and hands it over."""

from __future__ import annotations

import torch

from trimtab.serving.engines.vllm.live_request import BatchRow
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_request
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering

WIDTH, LAYERS = 8, 2


def measured(*names: str) -> WorkerSteering:
    """A worker through which each text of five tokens has gone, in a chunk of three and of two."""
    steering = WorkerSteering(
        layers=range(LAYERS), n_layers=LAYERS, hidden_size=WIDTH, device="cpu", max_requests=4
    )
    for name in names:
        steering.admit(name, {KEY: packed_request(None, measures=True)}, range(5))
        for start, n_tokens in ((0, 3), (3, 2)):
            steering.begin([BatchRow(name, n_tokens, start)])
            for layer in range(LAYERS):
                hidden = torch.ones(n_tokens, WIDTH) * (start + layer + 1)
                steering.at_layer(layer, hidden, None)
            steering.end()
        steering.forget(name)
    return steering


def test_every_chunk_is_measured() -> None:
    """Catches norms of the first chunk alone, on a server whose passes are small."""
    found = measured("one").take_norms()["one"]
    expected = [[scale * WIDTH**0.5 for scale in (s, s, s, s + 3, s + 3)] for s in (1, 2)]
    for layer in range(LAYERS):
        torch.testing.assert_close(found[layer], expected[layer])


def test_each_server_takes_its_own() -> None:
    """Catches an API server that takes, and forgets, what another one is waiting for."""
    steering = measured("one-a", "two-b")
    assert set(steering.take_norms("one")) == {"one-a"}
    assert set(steering.take_norms("two")) == {"two-b"}
    assert not steering.take_norms("one")

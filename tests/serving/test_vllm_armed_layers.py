"""Finding a vLLM model's decoder layers, and what an armed one hands over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_plans import N_LAYERS, WIDTH, arrived, compiled, drawn

from trimtab.serving.engines.vllm import armed_layers
from trimtab.serving.engines.vllm.live_request import BatchRow
from trimtab.serving.engines.vllm.plan_wire import KEY, packed_request
from trimtab.serving.engines.vllm.worker_steering import WorkerSteering
from trimtab.steering.errors import ModelLoadError


class Layer(nn.Module):
    """A decoder layer that returns (hidden, residual), or one of them."""

    def __init__(self, *, is_pair: bool) -> None:
        super().__init__()
        self.is_pair = is_pair

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return (hidden, residual) if self.is_pair else hidden


class PPMissingLayer(nn.Module):
    """Stands where another pipeline stage has the layer."""


def hosted(**lists: list[nn.Module]) -> nn.Module:
    """Return a model with module lists at dotted paths; `__` stands for the dot."""
    model = nn.Module()
    for path, modules in lists.items():
        at = model
        *way, last = path.split("__")
        for name in way:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, nn.ModuleList(modules))
    return model


def test_the_text_models_layers_are_found() -> None:
    """A vision tower or a list of experts of the same length is steered instead."""
    mine = [Layer(is_pair=True) for _ in range(4)]
    other = [nn.Linear(2, 2) for _ in range(4)]
    model = hosted(
        vision_tower__layers=list(other),
        language_model__model__layers=list(mine),
        language_model__model__head__experts=list(other),
        embed=[nn.Linear(2, 2) for _ in range(3)],
    )
    assert decoder(model) == dict(enumerate(mine))
    with pytest.raises(ModelLoadError, match="No list of 5 decoder layers"):
        armed_layers.decoder_layers(model, n_layers=5)


def decoder(model: nn.Module) -> dict[int, nn.Module]:
    return armed_layers.decoder_layers(model, n_layers=4)


def test_a_stage_has_its_own_layers_under_their_own_numbers() -> None:
    """Layer 2 of the model steered as layer 0 of the second stage."""
    mine = [PPMissingLayer(), PPMissingLayer(), Layer(is_pair=True), Layer(is_pair=True)]
    assert decoder(hosted(model__layers=list(mine))) == {2: mine[2], 3: mine[3]}


@pytest.mark.parametrize("is_pair", [True, False])
def test_an_armed_layer_hands_its_output_over(
    is_pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An armed layer that returns its output before it is steered, or arms its whole class."""
    steering = WorkerSteering(
        layers=range(N_LAYERS),
        n_layers=N_LAYERS,
        hidden_size=WIDTH,
        device="cpu",
        max_requests=1,
    )
    monkeypatch.setattr(armed_layers, "_steering", steering)
    mine, another = Layer(is_pair=is_pair), Layer(is_pair=is_pair)
    mine.trimtab_layer = 1  # type: ignore[assignment]
    mine.__class__ = armed_layers._armed(Layer)
    assert armed_layers._armed(Layer) is type(mine)
    was, zero = drawn(5, WIDTH), torch.zeros(5, WIDTH)

    def ran(layer: nn.Module) -> torch.Tensor:
        out = layer(was.clone(), zero.clone())
        return out[0] if is_pair else out

    assert torch.equal(ran(mine), was)
    steering.admit("x", {KEY: arrived(packed_request(compiled("a")))}, range(4))
    steering.begin([BatchRow("x", 5, 0)])
    assert torch.equal(ran(another), was)
    assert torch.equal(ran(mine), was + drawn(N_LAYERS, WIDTH, seed=ord("a"))[1])
    assert "failed" not in steering.end()["x"]
    assert torch.equal(ran(mine), was)

"""Three small vectors for tests of the steering step, compiled and held without a model."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.bank import Bank
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.plan import Plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import SteerStep
from trimtab.steering.vector import VectorArtifact

WIDTH, N_LAYERS = 16, 3
MODEL = ModelRef("toy", None, "llama", WIDTH, N_LAYERS)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Shelf:
    """Vectors on all layers by name: `b` is oblique to `a`, `near` is `a` turned by 1e-6."""

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        rows = drawn(ord(name[0]), N_LAYERS, WIDTH)
        if name == "b":
            rows = rows + 0.7 * drawn(ord("a"), N_LAYERS, WIDTH)
        if name == "near":
            rows = 3 * (drawn(ord("a"), N_LAYERS, WIDTH) + 1e-6 * rows)
        return VectorArtifact(
            id=name,
            model=MODEL,
            layers=(0, 1, 2),
            directions=rows,
            default_layers=(1,),
            method="caa",
            probe=torch.tensor([[0.5, 0.1]]).repeat(N_LAYERS, 1),
            probe_layer=0,
        )


SHELF = Shelf()


def compiled(spec: Any) -> Plan:
    return compile_plan(
        parse_spec(spec),
        SHELF,
        model=MODEL,
        hidden_norms=torch.ones(N_LAYERS),
        limits=Limits(max_dose=None),
    )


def requested(bank: Bank, spec: Any, *, n_prompt: int) -> SteeredRequest:
    lease = bank.acquire(compiled(spec))
    assert lease is not None
    return SteeredRequest(lease, n_prompt=n_prompt)


def passed(step: SteerStep, hidden: torch.Tensor, *, layers: int = N_LAYERS) -> torch.Tensor:
    """Send the same states through the steering of all layers, as a model of identities would."""
    for layer in range(layers):
        hidden = step.apply(layer, hidden)
    step.finish()
    return hidden

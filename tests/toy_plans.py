"""Plans of every kind on a model of three layers, and how they travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from toy_classifier import toy_classifier

from trimtab.steering.artifact import ModelRef
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.errors import NotFoundError
from trimtab.steering.lookup import Lookup
from trimtab.steering.plan import Plan, Reader
from trimtab.steering.spec import parse_spec
from trimtab.steering.vector import VectorArtifact

WIDTH, N_LAYERS = 16, 3
MODEL = ModelRef("toy", "f" * 64, "llama", WIDTH, N_LAYERS)


class Shelf:
    """Vectors of any name and a classifier `tone`, all drawn from a seed."""

    def classifier(self, name: str, *, param: str | None = None) -> ClassifierArtifact:
        if name != "tone":
            raise NotFoundError(f"Unknown classifier {name!r}.", param=param)
        return toy_classifier(MODEL, layers=(0, 1))

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        return VectorArtifact(
            id=name,
            model=MODEL,
            layers=tuple(range(N_LAYERS)),
            directions=drawn(N_LAYERS, WIDTH, seed=ord(name[0])),
            default_layers=(1,),
            method="caa",
            probe=torch.tensor([[0.5, 0.1]]).repeat(N_LAYERS, 1),
            probe_layer=0,
        )


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(spec: Any) -> Plan:
    return compile_plan(
        parse_spec(spec),
        Shelf(),
        model=MODEL,
        hidden_norms=torch.full((N_LAYERS,), 4.0),
        limits=Limits(max_dose=None),
    )


def probed(*names: str) -> tuple[Reader, ...]:
    lookup = Lookup(Shelf(), MODEL, N_LAYERS)
    return tuple(lookup.probe(name, path="probes[0]") for name in names)


GUIDED = {"classifier": "tone", "target": ["expert"], "avoid": ["casual"], "steps": 3}
GATE = {"probe": "tone/expert", "above": 0.3}
A_MEAN = {"probe": "a", "below": 0.6, "per": "prompt"}
SPECS: dict[str, Any] = {
    "added": {"vectors": [{"id": "a", "layers": [0, 1, 2]}]},
    "kept norm": {"vectors": [{"id": "a", "scale": 2, "normalize": True}]},
    "ablated": {"ablate": [{"id": "a"}, {"id": "b", "to": 0.5, "layers": [1]}]},
    "guided": {"guidance": [GUIDED | {"over_dose": True, "dose": 0.3, "until": 0.9}]},
    "window": {"vectors": [{"id": "a", "apply": {"prompt": False, "first": 3, "after": 1}}]},
    "token gate": {"vectors": [{"id": "b"}], "when": GATE},
    "prompt gate": {"vectors": [{"id": "b"}], "when": A_MEAN},
    "several": {
        "vectors": [{"id": "a"}, {"id": "b", "apply": {"prompt": False}, "when": GATE}],
        "guidance": [GUIDED | {"avoid_rival": True, "over_dose": True, "dose": 0.2}],
    },
}
PLANS = {name: compiled(spec) for name, spec in SPECS.items()}


def arrived(value: Any) -> Any:
    """Return a value as msgpack would hand it over; anything it has no word for is an error."""
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value)
        return {key: arrived(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [arrived(entry) for entry in value]
    assert value is None or type(value) in (bool, int, float, str, bytes), type(value)
    return value

"""One part of a plan in the making: terms gathered, then summed and fitted together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from trimtab.steering.errors import SpecError
from trimtab.steering.plan import Gate, Guide, LayerTerm, Part
from trimtab.steering.window import Window


@dataclass
class Draft:
    """The terms of a request that share their tokens and gate, on their way to one part."""

    window: Window
    gate: Gate | None
    gate_path: str = ""
    add: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    normalize: dict[int, bool] = field(default_factory=dict)
    ablations: dict[int, list[tuple[torch.Tensor, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    guides: dict[int, list[Guide]] = field(default_factory=lambda: defaultdict(list))

    @property
    def touched(self) -> set[int]:
        """Layers that something of it acts on."""
        return {*self.add, *self.ablations, *self.guides}

    def part(self, path: str) -> Part | None:
        """Return the finished part, or None if every scale is 0.

        Args:
            path: JSON path of the spec, for errors.

        Raises:
            SpecError: its gate is read after the first layer it should gate.
        """
        layers: dict[int, LayerTerm] = {}
        for layer in sorted(self.touched):
            # In a fixed order, so that reordered terms round alike and share a fingerprint.
            changes = [row.double() for row in sorted(self.add.get(layer, []), key=_bytes)]
            low_a = low_b = None
            if self.ablations.get(layer):
                entries = sorted(self.ablations[layer], key=lambda x: (_bytes(x[0]), x[1], x[2]))
                units, shares, targets = (list(x) for x in zip(*entries, strict=True))
                basis = torch.stack(units)  # [rank, hidden_size]
                # The pseudo-inverse makes several full ablations remove the whole span, also when
                # the directions are not orthogonal; for one direction it is the direction itself.
                # Directions closer than 1e-4 count as one: float32 could not tell them apart.
                dual = torch.linalg.pinv(basis.double(), rtol=1e-4).T
                low_b = dual.float().contiguous()
                share = torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
                low_a = (basis * share).float()
                # Along the dual, so that no target moves the component along another direction.
                target = torch.tensor(targets, dtype=torch.float64).unsqueeze(1)
                offset = (dual * share * target).sum(0)
                if bool(offset.any()):
                    changes.append(offset)
            add = torch.stack(changes).sum(0).float() if changes else None
            normalize = self.normalize.get(layer, False)
            guides = tuple(self.guides.get(layer, ()))
            layers[layer] = LayerTerm(add, low_a, low_b, normalize, guides)
        if not layers:
            return None
        gate = self.gate
        if gate is not None and gate.layer > min(layers):
            where = self.gate_path or f"{path}.when"
            raise SpecError(
                f"{where} reads layer {gate.layer}, after layer {min(layers)} which it should "
                "gate; set `when.layer` to an earlier layer or steer later layers.",
                param=where,
            )
        return Part.of(self.window, gate, layers)


def _bytes(row: torch.Tensor) -> bytes:
    return row.contiguous().numpy().tobytes()

"""What became of one decoder layer: its matrices, and the small weights that changed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.kernels.formats import Fp8Matrix, Packed, Parts, format_named
from trimtab.kernels.matmul import Activations
from trimtab.training.quantization.matrices import Quantized

_PARTS = ("scales", "tensor_scale", "row_scale", "zeros")


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A decoder layer after quantisation.

    Attributes:
        name: of the layer in the model.
        linears: name in the layer -> what it became.
        changed: name of a parameter in the layer -> its new value: what AWQ's scales were folded
            into.
        kept: names of linears that stayed as they are, with the reason.
        exponents: AWQ's, by the module the scale was folded into.
    """

    name: str
    linears: dict[str, Quantized]
    changed: dict[str, torch.Tensor]
    kept: dict[str, str]
    exponents: dict[str, float]

    def put_into(self, layer: nn.Module, activations: Activations) -> None:
        """Give a layer the weights it has after quantisation."""
        for name, value in self.changed.items():
            layer.get_parameter(name).data.copy_(value)
        for name, quantized in self.linears.items():
            quantized.put_into(layer, name, activations)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as named tensors, as a file holds it."""
        found = {f"changed/{name}": value for name, value in self.changed.items()}
        for name, quantized in self.linears.items():
            matrix = quantized.matrix
            if isinstance(matrix, Fp8Matrix):
                found |= {f"{name}/values": matrix.values, f"{name}/scale": matrix.scale}
            else:
                found[f"{name}/packed"] = matrix.packed
                for part in _PARTS:
                    value = getattr(matrix.parts, part)
                    if value is not None:
                        found[f"{name}/{part}"] = value
            if quantized.factors is not None:
                found |= {f"{name}/A": quantized.factors[0], f"{name}/B": quantized.factors[1]}
        # A tensor scale that linears share is one tensor, which safetensors refuses to write twice.
        return {
            name: (value.clone() if value.ndim == 0 else value.detach().cpu().contiguous())
            for name, value in found.items()
        }

    def facts(self) -> dict[str, Any]:
        """Return what the tensors do not say, fit for JSON."""
        return {
            "name": self.name,
            "linears": {
                name: {
                    "format": q.matrix.format,
                    "group_size": None if isinstance(q.matrix, Fp8Matrix) else q.matrix.group_size,
                    "weight_error": q.weight_error,
                    "output_error": q.output_error,
                }
                for name, q in self.linears.items()
            },
            "kept": self.kept,
            "exponents": self.exponents,
        }


def layer_from(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> LayerResult:
    """Return what `LayerResult.tensors` and `facts` were made from.

    Raises:
        KeyError, ValueError: tensors that do not fit the facts.
    """
    linears = {}
    for name, said in facts["linears"].items():
        if said["format"] == Fp8Matrix.format:
            matrix: Packed | Fp8Matrix = Fp8Matrix(
                tensors[f"{name}/values"], tensors[f"{name}/scale"]
            )
        else:
            fmt = format_named(said["format"], group_size=said["group_size"])
            parts = Parts(
                tensors[f"{name}/scales"],
                *(tensors.get(f"{name}/{part}") for part in _PARTS[1:]),
            )
            matrix = fmt.stored(tensors[f"{name}/packed"], parts)
        left = tensors.get(f"{name}/A")
        factors = None if left is None else (left, tensors[f"{name}/B"])
        linears[name] = Quantized(matrix, factors, said["weight_error"], said["output_error"])
    changed = {
        name.removeprefix("changed/"): value
        for name, value in tensors.items()
        if name.startswith("changed/")
    }
    return LayerResult(
        facts["name"], linears, changed, dict(facts["kept"]), dict(facts["exponents"])
    )

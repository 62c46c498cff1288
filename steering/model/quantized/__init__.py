"""Quantised models in folders: compressed-tensors' layout, written, read and run."""

from trimtab.steering.model.quantized.facts import QuantizationFacts
from trimtab.steering.model.quantized.layout import Layout, Matrix, from_tensors, to_tensors
from trimtab.steering.model.quantized.writer import QuantizedFolderWriter

__all__ = [
    "Layout",
    "Matrix",
    "QuantizationFacts",
    "QuantizedFolderWriter",
    "from_tensors",
    "to_tensors",
]

"""Tensor operations: the steering op, classifier guidance, attention. Knows nothing but tensors."""

from trimtab.kernels.dispatch import is_fused
from trimtab.kernels.guidance import Classifier, Goals, guide, probabilities, read
from trimtab.kernels.steer import LayerBank, shift, steer, steer_stream

__all__ = [
    "Classifier",
    "Goals",
    "LayerBank",
    "guide",
    "is_fused",
    "probabilities",
    "read",
    "shift",
    "steer",
    "steer_stream",
]

"""Tensor operations: the steering op, classifier guidance, attention. Knows nothing but tensors."""

from trimtab.kernels.guidance import Classifier, Goals, guide, probabilities, read
from trimtab.kernels.steer import LayerBank, shift, steer

__all__ = [
    "Classifier",
    "Goals",
    "LayerBank",
    "guide",
    "probabilities",
    "read",
    "shift",
    "steer",
]

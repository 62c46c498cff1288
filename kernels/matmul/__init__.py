"""Products with 4-bit weights: Triton kernels on Hopper, torch elsewhere. Knows only tensors."""

from trimtab.kernels.matmul.prepare import prepare
from trimtab.kernels.matmul.prepared import ACTIVATIONS, Activations, PreparedWeight

__all__ = ["ACTIVATIONS", "Activations", "PreparedWeight", "prepare"]

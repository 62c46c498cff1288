"""Tensor operations: the steering op and attention. Knows nothing but tensors."""

from trimtab.kernels.steer import LayerBank, probe, steer

__all__ = ["LayerBank", "probe", "steer"]

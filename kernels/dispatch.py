"""Which implementation of an op runs: Triton's on a GPU, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

Implementation = Literal["triton", "torch"]

MAX_WIDTH = 16384
"""The widest row that a Triton program holds in its registers; no model known has a wider one."""

logger = logging.getLogger(__name__)
_forced: Implementation | None = None


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Return whether an op on these tensors takes its Triton kernels.

    It does on a CUDA device. Where a gradient is asked for it does not: the kernels have none.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if _forced is not None:
        return _forced == "triton"
    return is_fused(tensors[0].device)


def is_fused(device: torch.device) -> bool:
    """Return whether ops on a device take Triton kernels, which want few launches, not few rows."""
    if _forced is not None:
        return _forced == "triton"
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    logger.warning("Triton is not installed: steering runs as plain torch, in several launches.")
    return False


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Take one implementation inside the block, on any device: for tests and benchmarks.

    It holds for the whole process, not for a thread. On a CPU "triton" needs Triton's interpreter.
    """
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before

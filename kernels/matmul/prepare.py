"""Choosing what a quantised matrix is multiplied with, by device, format and type."""

from __future__ import annotations

import importlib.util

import torch

from trimtab.kernels.formats import Packed
from trimtab.kernels.matmul import fragments
from trimtab.kernels.matmul.dense import DenseWeight
from trimtab.kernels.matmul.fragment_weight import FragmentWeight
from trimtab.kernels.matmul.int4_cpu import PackedInt4
from trimtab.kernels.matmul.prepared import ACTIVATIONS, Activations, PreparedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (9, 0)
"""Compute capability of Hopper, the first with what the kernels' PTX asks for."""


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: Hopper or later, and Triton installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def prepare(
    packed: Packed,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activations: Activations = "same",
) -> PreparedWeight:
    """Make a quantised matrix ready for products on one device.

    Args:
        packed: the matrix as it is stored.
        device: where products are computed; None means where `packed` is.
        dtype: of the activations.
        activations: `same` for W4A16, `fp8` for W4A8.

    Returns:
        The matrix, laid out for the fastest product there is for it: Triton's on Hopper and later,
        torch's packed kernel for INT4 on a CPU, and otherwise one with the dequantised matrix.

    Raises:
        ValueError: an unknown dtype or kind of activations, or FP8 activations on a GPU for a
            format other than FP4.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} activations; allowed: {', '.join(map(str, DTYPES))}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"{activations!r} activations; allowed: {', '.join(ACTIVATIONS)}")
    where = packed.device if device is None else torch.device(device)
    if where.type == "cuda" and has_kernels(where) and dtype != torch.float32:
        if activations == "fp8" and packed.codebook.name != "e2m1":
            raise ValueError(
                f"{packed.format} weights have no kernel for FP8 activations; FP4 formats have "
                "one, and activations='same' is for all"
            )
        if fragments.takes(packed):
            return FragmentWeight(packed, device=where, dtype=dtype, activations=activations)
    if where.type == "cpu" and activations == "same" and PackedInt4.takes(packed):
        return PackedInt4(packed, dtype=dtype)
    return DenseWeight(packed, device=where, dtype=dtype, activations=activations)

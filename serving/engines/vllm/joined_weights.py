"""The matrices of one linear layer of vLLM: several of the checkpoint's, side by side.

vLLM keeps q, k and v (and gate and up) in one layer. Where they have the same tensor scale, as
`trimtab quantize` gives them, or can be stored under one without a change of any value, they become
one matrix and one launch; otherwise they stay apart and only their outputs meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from trimtab.kernels.formats import Fp8Matrix, Packed
from trimtab.kernels.matmul import Activations, PreparedWeight, prepare
from trimtab.steering.model.quantized import Matrix
from trimtab.steering.model.quantized.fp8_weight import Fp8Weight


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to some rows of the output: `A (B x)`.

    Attributes:
        rows: of the joined output.
        a: `[n_rows, rank]`, in the model's dtype.
        b: `[rank, n_in]`, in the model's dtype.
    """

    rows: slice
    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, eq=False)
class JoinedWeights:
    """A linear layer's matrices, ready to multiply.

    Attributes:
        weights: one below the other; as few as can be.
        low_rank: what their quantisation lost and is added again.
    """

    weights: tuple[PreparedWeight, ...]
    low_rank: tuple[LowRank, ...] = ()

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply.

        Args:
            x: `[..., n_in]`.
            bias: `[n_out]` or None.

        Returns:
            `[..., n_out]` in x's dtype.
        """
        if len(self.weights) == 1:
            y = self.weights[0](x, bias)
        else:
            y = torch.cat([weight(x) for weight in self.weights], dim=-1)
            if bias is not None:
                y += bias
        for one in self.low_rank:
            y[..., one.rows] += functional.linear(functional.linear(x, one.b), one.a)
        return y


def joined(
    matrices: Sequence[Matrix],
    *,
    dtype: torch.dtype,
    activations: Activations,
    low_rank: Sequence[LowRank] = (),
) -> JoinedWeights:
    """Prepare matrices that have the same input.

    Args:
        matrices: in the order of their rows, all of one format, on the layer's device.
        dtype: of the model.
        activations: `fp8` rounds the input per token to E4M3 first.
        low_rank: factors of some rows.
    """
    one = as_one(matrices, activations=activations)
    kept = matrices if one is None else (one,)
    weights = (_prepared(matrix, dtype=dtype, activations=activations) for matrix in kept)
    return JoinedWeights(tuple(weights), tuple(low_rank))


def _prepared(matrix: Matrix, *, dtype: torch.dtype, activations: Activations) -> PreparedWeight:
    if isinstance(matrix, Fp8Matrix):
        return Fp8Weight(matrix, device=matrix.device, dtype=dtype, activations=activations)
    return prepare(matrix, dtype=dtype, activations=activations)


def as_one(matrices: Sequence[Matrix], *, activations: Activations = "same") -> Matrix | None:
    """Return one matrix with which the products are exactly the same, None if there is none."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, Fp8Matrix):
        eight = [m for m in matrices if isinstance(m, Fp8Matrix)]
        return Fp8Matrix(_stacked([m.values for m in eight]), torch.cat([m.scale for m in eight]))
    packed = [m for m in matrices if isinstance(m, Packed)]
    common = _common_scales(packed, may_move=activations == "same")
    if common is None:
        return None
    scales, shared = common
    parts = replace(
        first.parts,
        scales=scales,
        tensor_scale=shared,
        zeros=None if first.zeros is None else _stacked([_there(m.zeros) for m in packed]),
    )
    return replace(first, packed=_stacked([m.packed for m in packed]), parts=parts)


def _common_scales(
    matrices: Sequence[Packed], *, may_move: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return scales under one tensor scale, and that.

    Args:
        matrices: of one format.
        may_move: whether a scale may be stored as another number under another tensor scale. With
            FP8 activations levels are rounded with their scale, and a moved one rounds otherwise.
    """
    if matrices[0].tensor_scale is None:
        return _stacked([m.scales for m in matrices]), None
    factors = torch.stack([_there(m.tensor_scale) for m in matrices])
    candidates = [factors.amax(), factors.amin()]
    if bool(candidates[0] != candidates[1]) and not may_move:
        return None
    for shared in candidates:
        moved = [_relative_to(shared, m) for m in matrices]
        scales = [one for one in moved if one is not None]
        if len(scales) == len(matrices):
            return _stacked(scales), shared
    return None


def _relative_to(shared: torch.Tensor, matrix: Packed) -> torch.Tensor | None:
    """Return a matrix's scales under another tensor scale, None if any value would change."""
    values = matrix.scales.float() * _there(matrix.tensor_scale)
    scales = (values / shared).to(matrix.scales.dtype)
    return scales if torch.equal(scales.float() * shared, values) else None


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    kind = tensors[0].dtype
    # torch.cat knows float8 only in its later versions.
    rows = torch.cat([one.view(torch.uint8) if kind.itemsize == 1 else one for one in tensors])
    return rows.view(kind)


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor

"""The matrices of one linear layer of vLLM: several of the checkpoint's, side by side.

vLLM keeps q, k and v (and gate and up) in one layer. Each was quantised by itself, with a tensor
scale of its own. Where the scales of one can be stored relative to another's without a change of
any value, and with powers of two they nearly always can, they become one matrix and one launch;
otherwise they stay apart and only their outputs meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from trimtab.kernels.formats import Packed
from trimtab.kernels.matmul import PreparedWeight, prepare

Activations = Literal["same", "fp8"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to some rows of the output: `up @ (down @ x)`.

    Attributes:
        rows: of the joined output.
        up: `[n_rows, rank]`, in the model's dtype.
        down: `[rank, n_in]`, in the model's dtype.
    """

    rows: slice
    up: torch.Tensor
    down: torch.Tensor


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
            y[..., one.rows] += x @ one.down.t() @ one.up.t()
        return y


def joined(
    matrices: Sequence[Packed],
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
    one = as_one(matrices)
    kept = matrices if one is None else (one,)
    weights = (prepare(m, device=m.device, dtype=dtype, activations=activations) for m in kept)
    return JoinedWeights(tuple(weights), tuple(low_rank))


def as_one(matrices: Sequence[Packed]) -> Packed | None:
    """Return one matrix of exactly the same values, or None if its scales cannot be stored."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    scales, shared = _common_scales(matrices)
    if scales is None:
        return None
    parts = replace(
        first.parts,
        scales=scales,
        tensor_scale=shared,
        row_scale=_stacked([m.row_scale for m in matrices]),
        zeros=_stacked([m.zeros for m in matrices]),
    )
    return replace(first, packed=torch.cat([m.packed for m in matrices]), parts=parts)


def _common_scales(
    matrices: Sequence[Packed],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    own = [m.tensor_scale for m in matrices]
    if own[0] is None:
        return _stacked([m.scales for m in matrices]), None
    factors = torch.stack([scale for scale in own if scale is not None])
    for shared in (factors.amax(), factors.amin()):
        moved = [_relative_to(shared, m) for m in matrices]
        if all(scales is not None for scales in moved):
            return _stacked(moved), shared
    return None, None


def _relative_to(shared: torch.Tensor, matrix: Packed) -> torch.Tensor | None:
    """Return a matrix's scales under another tensor scale, None if any value would change."""
    assert matrix.tensor_scale is not None
    values = matrix.scales.float() * matrix.tensor_scale
    scales = (values / shared).to(matrix.scales.dtype)
    return scales if torch.equal(scales.float() * shared, values) else None


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [one for one in tensors if one is not None]
    if not given:
        return None
    kind = given[0].dtype
    # torch.cat knows float8 only in its later versions.
    rows = torch.cat([one.view(torch.uint8) if kind.itemsize == 1 else one for one in given])
    return rows.view(kind)

"""What a 4-bit format is: how scales are chosen for a matrix, and what is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from trimtab.kernels.formats import nibbles
from trimtab.kernels.formats.codebook import Codebook
from trimtab.kernels.formats.grid import Grid, Rounding
from trimtab.kernels.formats.packed import Packed
from trimtab.kernels.formats.parts import Parts
from trimtab.kernels.formats.rows import row_chunks

Search = Literal["amax", "mse"]
SEARCHES = ("amax", "mse")
_NAN_BYTE = 255  # of powers of two


@dataclass(frozen=True)
class Format(ABC):
    """A 4-bit format with its group size. Weights are `[n_out, n_in]`, groups run along n_in.

    Attributes:
        name: as in the registry.
        group_size: columns that share a scale.
    """

    name: str
    group_size: int

    codebook: ClassVar[Codebook]
    scale_bits: ClassVar[float]  # of one group, as it is in a file
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]]
    has_tensor_scale: ClassVar[bool] = False
    has_row_scale: ClassVar[bool] = False

    @abstractmethod
    def allows(self, group_size: int) -> bool:
        """Whether the format has groups of this size."""

    @abstractmethod
    def shared_scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return what all rows' scales are relative to, a scalar, float32, or None."""

    @abstractmethod
    def candidates(
        self, groups: torch.Tensor, *, shared: torch.Tensor | None, search: Search
    ) -> list[Parts]:
        """Return the scales to choose from, the one of `amax` first.

        Args:
            groups: some rows of the matrix, `[rows, n_groups, group_size]`, float32.
            shared: what `shared_scale` said of the whole matrix.
            search: `amax` asks for one candidate only.
        """

    @property
    def has_zeros(self) -> bool:
        """Whether a group stores the code that means 0."""
        return False

    def bits(self, shape: tuple[int, int]) -> float:
        """Return the bits a weight takes in a file, scales included."""
        n_out, n_in = shape
        n_groups = n_out * (n_in // self.group_size)
        beside = 32 * self.has_tensor_scale + 32 * n_out * self.has_row_scale
        zeros = 4 * n_groups * self.has_zeros
        return 4 + (n_groups * self.scale_bits + beside + zeros) / (n_out * n_in)

    def fit(
        self,
        weight: torch.Tensor,
        *,
        search: Search = "amax",
        importance: torch.Tensor | None = None,
        shared: torch.Tensor | None = None,
    ) -> Grid:
        """Choose the scales of a matrix.

        Args:
            weight: `[n_out, n_in]`, any floating dtype.
            search: `amax` takes the scale that the largest magnitude of the group asks for; `mse`
                the best of several, by the squared error of rounding to nearest.
            importance: `[n_in]`, weights of the columns' squared errors, such as the mean square
                of each input; None means all equal.
            shared: a larger scale than the matrix's own `shared_scale`. Matrices that a server
                multiplies as one (queries, keys and values; gate and up) must have one tensor scale
                in NVFP4: the largest of theirs.

        Returns:
            The values that weights of this matrix can take.

        Raises:
            ValueError: not a matrix of whole groups, NaN or infinity in it, no such search, or a
                shared scale that is too small.
        """
        self.check(weight.shape)
        if not weight.is_floating_point():
            raise ValueError(f"{self.name}: a weight of type {weight.dtype} is not floating point")
        if search not in SEARCHES:
            raise ValueError(f"{search!r} is no search; allowed: {', '.join(SEARCHES)}")
        columns = None if importance is None else self._column_weights(importance, weight)
        for rows in row_chunks(*weight.shape):
            if not torch.isfinite(weight[rows]).all():
                raise ValueError(f"{self.name}: the weight holds NaN or infinity")
        own = self.shared_scale(weight)
        if shared is None:
            shared = own
        elif own is None or bool(shared < own):
            raise ValueError(f"{self.name}: a shared scale {shared} for a matrix that needs {own}")
        chosen = []
        for rows in row_chunks(*weight.shape):
            groups = weight[rows].float().unflatten(1, (-1, self.group_size))
            candidates = self.candidates(groups, shared=shared, search=search)
            chosen.append(_best(candidates, groups, codebook=self.codebook, columns=columns))
        return self.grid(_stacked(chosen), shape=(weight.shape[0], weight.shape[1]))

    def grid(self, parts: Parts, *, shape: tuple[int, int]) -> Grid:
        """Return the grid of stored scales."""
        return Grid(self.name, self.group_size, shape, self.codebook, parts)

    def pack(self, codes: torch.Tensor, grid: Grid) -> Packed:
        """Return codes `[n_out, n_in]`, uint8 0..15, and their grid as they are stored.

        Raises:
            ValueError: codes of another shape or type than the grid's matrix.
        """
        if codes.dtype != torch.uint8 or tuple(codes.shape) != grid.shape:
            raise ValueError(
                f"{self.name}: codes {tuple(codes.shape)} of {codes.dtype} for a {grid.shape} grid"
            )
        packed = nibbles.pack(codes)
        return Packed(self.name, self.group_size, self.codebook, packed, grid.parts)

    def quantize(
        self,
        weight: torch.Tensor,
        *,
        search: Search = "amax",
        importance: torch.Tensor | None = None,
        shared: torch.Tensor | None = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
    ) -> Packed:
        """Choose scales, round and pack; the arguments are those of `fit` and `Grid.encode`."""
        grid = self.fit(weight, search=search, importance=importance, shared=shared)
        return self.pack(grid.encode(weight, rounding=rounding, generator=generator), grid)

    def stored(self, packed: torch.Tensor, parts: Parts) -> Packed:
        """Return a matrix read from a file, after a look at its tensors.

        Args:
            packed: `[n_out, n_in / 2]`, uint8, the even column in the low half.
            parts: the scales.

        Raises:
            ValueError: tensors of other shapes or types than the format has, or scales that are
                negative, infinite or NaN.
        """
        if packed.ndim != 2 or packed.dtype != torch.uint8:
            raise ValueError(f"{self.name}: packed codes {_seen(packed)}, expected uint8 [n, m/2]")
        n_out, n_in = packed.shape[0], 2 * packed.shape[1]
        self.check((n_out, n_in))
        groups = (n_out, n_in // self.group_size)
        wanted = {
            "scales": (parts.scales, groups, self.scale_dtypes),
            "tensor_scale": (
                parts.tensor_scale,
                () if self.has_tensor_scale else None,
                (torch.float32,),
            ),
            "row_scale": (
                parts.row_scale,
                (n_out,) if self.has_row_scale else None,
                (torch.float32,),
            ),
            "zeros": (parts.zeros, groups if self.has_zeros else None, (torch.uint8,)),
        }
        for what, (tensor, shape, dtypes) in wanted.items():
            if tensor is None and shape is None:
                continue
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                raise ValueError(
                    f"{self.name}: {what} {_seen(tensor)}, expected {shape} of "
                    f"{' or '.join(str(d) for d in dtypes)}"
                )
        steps = parts.steps()
        is_byte = parts.scales.dtype == torch.uint8
        has_nan = is_byte and bool((parts.scales == _NAN_BYTE).any())
        if has_nan or not bool((torch.isfinite(steps) & (steps >= 0)).all()):
            raise ValueError(f"{self.name}: a scale is negative, infinite or NaN")
        return Packed(self.name, self.group_size, self.codebook, packed, parts)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape that has no whole groups.

        Raises:
            ValueError: not two dimensions, no columns, or a ragged last group.
        """
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"{self.name}: a weight must be a filled matrix, not {tuple(shape)}")
        if shape[1] % self.group_size:
            raise ValueError(
                f"{self.name}: {shape[1]} columns are no multiple of the group of "
                f"{self.group_size}; keep such a layer as it is"
            )

    def _column_weights(self, importance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the importance as `[n_groups, group_size]`, float32, largest 1."""
        given = importance.to(device=weight.device, dtype=torch.float32)
        if tuple(given.shape) != (weight.shape[1],):
            raise ValueError(
                f"{self.name}: importance {tuple(given.shape)} for {weight.shape[1]} columns"
            )
        if not torch.isfinite(given).all() or (given < 0).any():
            raise ValueError(f"{self.name}: importance must be finite and not negative")
        largest = given.amax()
        return (given / torch.where(largest > 0, largest, 1.0)).unflatten(0, (-1, self.group_size))


def _best(
    candidates: list[Parts],
    groups: torch.Tensor,
    *,
    codebook: Codebook,
    columns: torch.Tensor | None,
) -> Parts:
    """Return, group by group, the candidate of the least squared error; ties go to the earlier."""
    best = candidates[0]
    if len(candidates) == 1:
        return best
    first = best.steps()
    least: torch.Tensor | None = None
    for parts in candidates:
        step = parts.steps()
        zero = codebook.zero if parts.zeros is None else parts.zeros.unsqueeze(-1)
        units = groups / step.unsqueeze(-1) + zero
        off = codebook.rounded(units).sub_(units).square_()
        if columns is not None:
            off.mul_(columns)
        # In units of the first candidate's step: the squares of huge weights would overflow.
        error = off.sum(-1) * (step / first).square()
        if least is None:
            least = error
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        best = replace(
            best,
            scales=_where(is_better, parts.scales, best.scales),
            zeros=None
            if best.zeros is None or parts.zeros is None
            else torch.where(is_better, parts.zeros, best.zeros),
        )
    return best


def _where(condition: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    if yes.element_size() == 1:  # torch.where knows no float8
        picked = torch.where(condition, yes.view(torch.uint8), no.view(torch.uint8))
        return picked.view(yes.dtype)
    return torch.where(condition, yes, no)


def _stacked(chunks: list[Parts]) -> Parts:
    """Return the parts of consecutive rows as one."""
    if len(chunks) == 1:
        return chunks[0]
    scales = [c.scales for c in chunks]
    kind = scales[0].dtype
    if kind.itemsize == 1:  # torch.cat knows float8 only in its later versions
        scales = [s.view(torch.uint8) for s in scales]
    row_scales = [c.row_scale for c in chunks if c.row_scale is not None]
    zeros = [c.zeros for c in chunks if c.zeros is not None]
    return Parts(
        scales=torch.cat(scales).view(kind),
        tensor_scale=chunks[0].tensor_scale,
        row_scale=torch.cat(row_scales) if row_scales else None,
        zeros=torch.cat(zeros) if zeros else None,
    )


def _seen(tensor: torch.Tensor | None) -> str:
    return "is missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"

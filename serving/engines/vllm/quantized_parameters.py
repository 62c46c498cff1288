"""The parameters that vLLM reads a quantised matrix into, and the matrix that is in them.

vLLM's own parameter classes cut what is read from the checkpoint: along the rows for layers whose
outputs are shared out among ranks, along the columns where the inputs are, and into the rows of
their shard where several matrices of the checkpoint make one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from trimtab.kernels.formats import fp8
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized import Layout, Matrix, from_tensors
from trimtab.steering.model.quantized.layout import (
    GLOBAL_SCALE,
    PACKED,
    SHAPE,
    WEIGHT,
    ZERO_POINT,
)

WORD = 8  # codes in an int32
_QKV = {"q": 0, "k": 1, "v": 2}
_BOTH: dict[str, Any] = {"input_dim": 1, "output_dim": 0}


@dataclass
class QuantizedParameters:
    """The parameters of one layer on one rank.

    Attributes:
        name: the layer's path in vLLM's model.
        layout: of its matrices, which are one below the other.
        n_in: columns that this rank has.
        sizes: rows that this rank has of each matrix.
        n_in_whole: columns of the matrices in the checkpoint.
        loader: the layer's own, which puts a checkpoint's tensor into a parameter.
    """

    name: str
    layout: Layout
    n_in: int
    sizes: tuple[int, ...]
    n_in_whole: int
    loader: Callable[..., None]
    _seen: dict[str, set[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        group = self.layout.group_size or self.n_in_whole
        if self.layout.format == "fp8":
            return
        if self.n_in % group:
            raise ModelLoadError(
                f"{self.name} cannot be shared out so: a rank's {self.n_in} columns are no "
                f"multiple of the {group} that share a scale. Use fewer ranks."
            )
        if self.layout.format.startswith("int4") and self.n_in % WORD:
            raise ModelLoadError(
                f"{self.name} cannot be shared out so: a rank's {self.n_in} columns end within a "
                f"word of {WORD}. Use fewer ranks."
            )
        if self.layout.format == "int4-asym" and any(size % WORD for size in self.sizes):
            raise ModelLoadError(
                f"{self.name} cannot be shared out so: zero points are stored {WORD} rows "
                f"together, and a rank has {', '.join(map(str, self.sizes))}. Use fewer ranks."
            )

    @property
    def rows(self) -> list[slice]:
        """Where each matrix is."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def make(self) -> dict[str, BasevLLMParameter]:
        """Return new parameters by their name."""
        return {suffix: self._parameter(suffix) for suffix in self.layout.suffixes}

    def _parameter(self, suffix: str) -> BasevLLMParameter:
        n_out, n_in, format = sum(self.sizes), self.n_in, self.layout.format
        n_groups = n_in // (self.layout.group_size or n_in)
        is_int = format.startswith("int4")

        def made(kind: Any, shape: Sequence[int], dtype: torch.dtype, **more: Any) -> Any:
            data = torch.empty(*shape, dtype=dtype)
            return kind(data=data, weight_loader=self._followed(suffix), **more)

        if suffix == WEIGHT:
            return made(ModelWeightParameter, (n_out, n_in), fp8.DTYPE, **_BOTH)
        if suffix == PACKED and is_int:
            more = _BOTH | {"packed_dim": 1, "packed_factor": WORD}
            return made(PackedvLLMParameter, (n_out, n_in // WORD), torch.int32, **more)
        if suffix == PACKED:
            return made(ModelWeightParameter, (n_out, n_in // 2), torch.uint8, **_BOTH)
        if suffix == GLOBAL_SCALE:
            return made(PerTensorScaleParameter, (len(self.sizes),), torch.float32)
        if suffix == SHAPE:
            return made(BasevLLMParameter, (2,), torch.int64)
        if suffix == ZERO_POINT:
            more = _BOTH | {"packed_dim": 0, "packed_factor": WORD}
            return made(PackedvLLMParameter, (n_out // WORD, n_groups), torch.int32, **more)
        if format == "fp8":
            return made(ChannelQuantScaleParameter, (n_out, 1), torch.float32, output_dim=0)
        # Floating scales in float32: whatever the file's type is, it is read without loss.
        kind = {"nvfp4": fp8.DTYPE, "mxfp4": torch.uint8}.get(format, torch.float32)
        return made(GroupQuantScaleParameter, (n_out, n_groups), kind, **_BOTH)

    def _followed(self, suffix: str) -> Callable[..., None]:
        """Return the layer's own loader, which from now on is followed.

        vLLM does not look whether a quantised layer was given all its weights, and what is not
        read is whatever the memory held.
        """
        seen = self._seen.setdefault(suffix, set())

        def load(parameter: Any, loaded: torch.Tensor, *shard: Any) -> None:
            self.loader(parameter, loaded, *shard)
            for one in shard or (None,):
                seen.update(one if isinstance(one, tuple) else (one,))

        return load

    def check_whole(self) -> None:
        """Refuse a checkpoint that lacked something of this layer.

        Raises:
            ModelLoadError: says what it lacked.
        """
        wanted = {None} if len(self.sizes) == 1 else set(range(len(self.sizes)))
        for suffix, seen in self._seen.items():
            got = {_QKV.get(one, one) for one in seen}
            if None not in got and not wanted <= got:
                raise ModelLoadError(
                    f"The checkpoint has no {suffix} for some of {self.name}: it is not whole."
                )

    def matrices(self, layer: Any) -> list[Matrix]:
        """Return what was read, one matrix after the other, this rank's part of each.

        Raises:
            ModelLoadError: numbers that cannot be.
        """
        found = []
        for number, rows in enumerate(self.rows):
            tensors = {
                suffix: self._part(getattr(layer, suffix).data, suffix, rows, number)
                for suffix in self.layout.suffixes
            }
            try:
                found.append(from_tensors(self.layout, tensors))
            except ValueError as error:
                raise ModelLoadError(f"The checkpoint's {self.name}: {error}.") from None
        return found

    def _part(self, data: torch.Tensor, suffix: str, rows: slice, number: int) -> torch.Tensor:
        if suffix == SHAPE:  # the file's is that of all ranks' parts
            return torch.tensor([rows.stop - rows.start, self.n_in])
        if suffix == GLOBAL_SCALE:
            return data[number : number + 1]
        if suffix == ZERO_POINT:
            return data[rows.start // WORD : rows.stop // WORD]
        return data[rows]

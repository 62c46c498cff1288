"""How a linear layer of vLLM keeps, loads and applies a 4-bit weight.

vLLM's own parameter classes cut what is read from the checkpoint: along the rows for layers whose
outputs are shared out among ranks, along the columns where the inputs are, and into the rows of
their shard where several matrices of the checkpoint make one layer. When all is loaded the parts
become `JoinedWeights` and the parameters are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)

from trimtab.kernels.formats import Format, Packed, Parts
from trimtab.serving.engines.vllm.joined_weights import (
    Activations,
    JoinedWeights,
    LowRank,
    joined,
)
from trimtab.serving.engines.vllm.low_rank import LowRankFile
from trimtab.steering.errors import ModelLoadError

OP = "trimtab::quantized_linear"
MIN_CAPABILITY = 80
_QKV = {"q": 0, "k": 1, "v": 2}

_library: torch.library.Library | None = None
_weights: WeakValueDictionary[int, JoinedWeights] = WeakValueDictionary()
"""By the address of the layer's `weight_packed`, see `_multiplied`. The layers own them."""


def register_op() -> None:
    """Define the custom op, once a process."""
    global _library
    if _library is not None:
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    _library = torch.library.Library("trimtab", "FRAGMENT")
    direct_register_custom_op(
        OP.partition("::")[2],
        _multiplied,
        mutates_args=[],
        fake_impl=_shaped,
        target_lib=_library,
    )


def _multiplied(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, n_out: int
) -> torch.Tensor:
    """Multiply by the weight that is known by a tensor's address.

    A tensor is an input of the compiled graph, so that layers of equal shapes share what is
    compiled; a number would be part of it, and each layer would be compiled for itself.
    """
    return _weights[weight.data_ptr()](x, bias)


def _shaped(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, n_out: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n_out))


class FourBitScheme(CompressedTensorsScheme):  # type: ignore[misc]
    """What vLLM's compressed-tensors method asks of a scheme, for one layer of 4-bit weights.

    Args:
        name: the layer's path in vLLM's model.
        format: of the stored matrices.
        activations: `fp8` rounds inputs per token to E4M3 first.
        matrices: the checkpoint's names of the matrices that make up the layer, in their order.
        low_rank: factors by those names; None if the folder has none.
    """

    def __init__(
        self,
        name: str,
        *,
        format: Format,
        activations: Activations,
        matrices: Sequence[str],
        low_rank: LowRankFile | None = None,
    ) -> None:
        self.name = name
        self.format = format
        self.activations = activations
        self.matrices = tuple(matrices)
        self.low_rank = low_rank

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability that the kernels need, as vLLM writes it."""
        return MIN_CAPABILITY

    def create_weights(
        self,
        layer: Any,
        *,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        """Make the parameters that the checkpoint is read into.

        Raises:
            ModelLoadError: this rank's part does not consist of whole groups.
        """
        self.n_in, self.sizes = input_size_per_partition, tuple(output_partition_sizes)
        self.dtype = params_dtype
        check_cut(self.name, self.format, n_in=self.n_in, sizes=self.sizes)
        self._loader = weight_loader
        self._loads: dict[str, set[Any]] = {}
        for name, parameter in self._parameters().items():
            layer.register_parameter(name, parameter)

    def _parameters(self) -> dict[str, BasevLLMParameter]:
        n_out, n_in = sum(self.sizes), self.n_in
        n_groups = n_in // self.format.group_size
        is_int = self.format.name in ("int4", "int4-asym")
        codes: dict[str, Any] = {"input_dim": 1, "output_dim": 0}
        eight: dict[str, Any] = codes | {"packed_factor": 8}

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype)

        made: dict[str, BasevLLMParameter] = {}

        def add(name: str, kind: Any, data: torch.Tensor, **more: Any) -> None:
            made[name] = kind(data=data, weight_loader=self._noted(name), **more)

        if is_int:
            data = empty(n_out, n_in // 8, dtype=torch.int32)
            add("weight_packed", PackedvLLMParameter, data, packed_dim=1, **eight)
            # Whatever the file's type is, it is read without loss.
            data = empty(n_out, n_groups, dtype=torch.float32)
            add("weight_scale", GroupQuantScaleParameter, data, **codes)
            add("weight_shape", BasevLLMParameter, empty(2, dtype=torch.int64))
        else:
            data = empty(n_out, n_in // 2, dtype=torch.uint8)
            add("weight_packed", ModelWeightParameter, data, **codes)
            data = empty(n_out, n_groups, dtype=self.format.scale_dtypes[0])
            add("weight_scale", GroupQuantScaleParameter, data, **codes)
        if self.format.has_zeros:
            data = empty(n_out // 8, n_groups, dtype=torch.int32)
            add("weight_zero_point", PackedvLLMParameter, data, packed_dim=0, **eight)
        if self.format.has_tensor_scale:
            data = empty(len(self.sizes), dtype=torch.float32)
            add("weight_global_scale", PerTensorScaleParameter, data)
        return made

    def _noted(self, name: str) -> Callable[..., None]:
        """Return the layer's own loader, which from now on is followed.

        vLLM does not look whether a quantised layer was given all its weights, and what is not
        read is whatever the memory held.
        """
        seen = self._loads.setdefault(name, set())

        def load(parameter: Any, loaded: torch.Tensor, shard: Any = None) -> None:
            if shard is None:
                self._loader(parameter, loaded)
            else:
                self._loader(parameter, loaded, shard)
            seen.update(shard if isinstance(shard, tuple) else (shard,))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make of what was read what multiplies, and drop the parameters.

        Raises:
            ModelLoadError: the checkpoint lacks a part of this layer.
        """
        self._check_whole()
        device = layer.weight_packed.device
        weights = joined(
            [self._matrix(layer, rows, number) for number, rows in enumerate(self._rows())],
            dtype=self.dtype,
            activations=self.activations,
            low_rank=[] if self.low_rank is None else self._low_rank(layer, device),
        )
        for name in self._loads:
            delattr(layer, name)
        # Its address is the weights' name, and vLLM's LoRA looks there for the layer's device.
        key = torch.zeros(1, dtype=torch.uint8, device=device)
        layer.register_parameter("weight_packed", nn.Parameter(key, requires_grad=False))
        layer.trimtab_weights = _weights[key.data_ptr()] = weights

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply `[..., n_in]` and return `[..., n_out]`."""
        y: torch.Tensor = torch.ops.trimtab.quantized_linear(
            x, bias, layer.weight_packed, sum(self.sizes)
        )
        return y

    def _rows(self) -> list[slice]:
        ends = list(itertools.accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def _check_whole(self) -> None:
        if is_made_up():
            return
        wanted = {None} if len(self.sizes) == 1 else set(range(len(self.sizes)))
        for name, seen in self._loads.items():
            got = {_QKV.get(one, one) for one in seen}
            if None not in got and not wanted <= got:
                raise ModelLoadError(
                    f"The checkpoint has no {name} of {' and '.join(self.matrices)}: it is not whole."
                )

    def _matrix(self, layer: Any, rows: slice, number: int) -> Packed:
        """Return one of the layer's matrices, this rank's part of it."""
        codes, scales = layer.weight_packed.data[rows], layer.weight_scale.data[rows]
        shared = zeros = None
        if self.format.has_zeros:
            words = layer.weight_zero_point.data[rows.start // 8 : rows.stop // 8]
            zeros = unpacked_rows(words)
        if self.format.has_tensor_scale:
            # Written as what the weight was multiplied by.
            shared = layer.weight_global_scale.data[number].reciprocal()
        # Eight codes of an int32 are the nibbles of its bytes, in order.
        return self.format.stored(
            codes.contiguous().view(torch.uint8),
            Parts(scales=scales, tensor_scale=shared, zeros=zeros),
        )

    # --- low-rank factors

    def _low_rank(self, layer: Any, device: torch.device) -> list[LowRank]:
        """Return this rank's part of the factors, cut by vLLM's own loaders."""
        assert self.low_rank is not None
        rows = self._rows()
        if len(self.matrices) == 1:  # also where the checkpoint holds them as one
            places: list[tuple[str, slice, Any]] = [
                (self.matrices[0], slice(0, sum(self.sizes)), None)
            ]
        else:
            ids = list(_QKV) if isinstance(layer, QKVParallelLinear) else range(len(rows))
            places = list(zip(self.matrices, rows, ids, strict=True))
        found = []
        for name, where, shard in places:
            factors = self.low_rank.take(name)
            if factors is not None:
                up, down = (one.to(device=device, dtype=self.dtype) for one in factors)
                up = self._cut_rows(layer, up, shard)[where]
                found.append(LowRank(where, up.contiguous(), self._cut_columns(layer, down)))
        return found

    def _cut_rows(self, layer: Any, up: torch.Tensor, shard: Any) -> torch.Tensor:
        data = up.new_zeros(sum(self.sizes), up.shape[1])
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=self._loader)
        return self._cut(layer, parameter, up, shard)

    def _cut_columns(self, layer: Any, down: torch.Tensor) -> torch.Tensor:
        if down.shape[1] == self.n_in:
            return down
        data = down.new_zeros(down.shape[0], self.n_in)
        parameter = RowvLLMParameter(data=data, input_dim=1, weight_loader=self._loader)
        return self._cut(layer, parameter, down, None)

    def _cut(self, layer: Any, parameter: Any, whole: torch.Tensor, shard: Any) -> torch.Tensor:
        parameter.tp_rank, parameter.tp_size = layer.tp_rank, layer.tp_size
        self._loader(parameter, whole, *(() if shard is None else (shard,)))
        data: torch.Tensor = parameter.data
        return data


def check_cut(name: str, format: Format, *, n_in: int, sizes: Sequence[int]) -> None:
    """Refuse a part of a matrix that does not consist of whole groups, or of whole words.

    Raises:
        ModelLoadError: says which layer, and what would be whole.
    """
    if n_in % format.group_size:
        raise ModelLoadError(
            f"{name} cannot be shared out so: a rank's {n_in} columns are no multiple of the "
            f"{format.group_size} that share a scale in {format.name}. Use fewer ranks."
        )
    if format.has_zeros and any(size % 8 for size in sizes):
        raise ModelLoadError(
            f"{name} cannot be shared out so: the zero points of {format.name} are stored eight "
            f"rows together, and a rank has {', '.join(map(str, sizes))}. Use fewer ranks."
        )


def unpacked_rows(words: torch.Tensor) -> torch.Tensor:
    """Return the codes of int32 `[n / 8, m]`, eight rows a word, as uint8 `[n, m]`."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32).view(1, 8, 1)
    return ((words.unsqueeze(1) >> shifts) & 15).to(torch.uint8).flatten(0, 1)


def is_made_up() -> bool:
    """Whether vLLM was told to fill the model with random numbers."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"

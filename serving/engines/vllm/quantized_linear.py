"""How a linear layer of vLLM multiplies by quantised weights: a scheme, and the op it calls."""

from __future__ import annotations

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
from vllm.model_executor.parameter import ChannelQuantScaleParameter, RowvLLMParameter

from trimtab.kernels.matmul import Activations
from trimtab.serving.engines.vllm.joined_weights import JoinedWeights, LowRank, joined
from trimtab.serving.engines.vllm.low_rank import LowRankFile
from trimtab.serving.engines.vllm.quantized_parameters import QuantizedParameters
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized import Layout

OP = "trimtab::quantized_linear"
MIN_CAPABILITY = 80  # bfloat16; below 9.0 products are those of the dequantised matrix

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


class QuantizedScheme(CompressedTensorsScheme):
    """What vLLM's compressed-tensors method asks of a scheme, for one layer.

    Args:
        name: the layer's path in vLLM's model.
        layout: of the stored matrices.
        activations: `fp8` rounds inputs per token to E4M3 first.
        matrices: paths of the checkpoint's matrices that make up the layer, in their order.
        low_rank: factors by those paths; None if the folder has none.
    """

    def __init__(
        self,
        name: str,
        *,
        layout: Layout,
        activations: Activations,
        matrices: Sequence[str],
        low_rank: LowRankFile | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
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
        input_size: int,
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
        self.dtype, self.loader = params_dtype, weight_loader
        self.parameters = QuantizedParameters(
            self.name,
            self.layout,
            n_in=input_size_per_partition,
            sizes=tuple(output_partition_sizes),
            n_in_whole=input_size,
            loader=weight_loader,
        )
        for name, parameter in self.parameters.make().items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make of what was read what multiplies, and drop the parameters.

        Raises:
            ModelLoadError: the checkpoint lacks a part of this layer, or our kernels cannot run it.
        """
        if not _is_made_up():
            self.parameters.check_whole()
        matrices = self.parameters.matrices(layer)
        device = matrices[0].device
        for name in self.layout.suffixes:
            delattr(layer, name)
        low_rank = self._low_rank(layer, device)
        try:
            weights = joined(
                matrices, dtype=self.dtype, activations=self.activations, low_rank=low_rank
            )
        except ValueError as error:
            raise ModelLoadError(f"{self.name} cannot be run on {device}: {error}.") from None
        # Its address is the weights' name, and vLLM's LoRA looks there for the layer's device.
        key = torch.zeros(1, dtype=torch.uint8, device=device)
        layer.register_parameter("weight_packed", nn.Parameter(key, requires_grad=False))
        layer.trimtab_weights = _weights[key.data_ptr()] = weights

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply `[..., n_in]` and return `[..., n_out]`."""
        n_out = sum(self.parameters.sizes)
        y: torch.Tensor = torch.ops.trimtab.quantized_linear(x, bias, layer.weight_packed, n_out)
        return y

    # --- low-rank factors

    def _low_rank(self, layer: Any, device: torch.device) -> list[LowRank]:
        """Return this rank's part of the factors, cut by vLLM's own loaders."""
        if self.low_rank is None:
            return []
        rows = self.parameters.rows
        ids: list[Any] = (
            list("qkv") if isinstance(layer, QKVParallelLinear) else [*range(len(rows))]
        )
        if len(self.matrices) == 1:  # also where the checkpoint holds them as one
            rows, ids = [slice(0, rows[-1].stop)], [None]
        if len(ids) != len(self.matrices):
            raise ModelLoadError(
                f"{self.name} is made of {len(ids)} parts on vLLM and of {len(self.matrices)} "
                "matrices in the checkpoint: which part a low-rank correction belongs to is not "
                "known. Use the embedded engine."
            )
        found = []
        for name, where, shard in zip(self.matrices, rows, ids, strict=True):
            factors = self.low_rank.take(name)
            if factors is None:
                continue
            try:
                a, b = (one.to(device=device, dtype=self.dtype) for one in factors)
                a = self._cut_rows(layer, a, shard)[where].contiguous()
                found.append(LowRank(where, a, self._cut_columns(layer, b)))
            except (AssertionError, RuntimeError) as error:
                raise ModelLoadError(
                    f"The low-rank factors of {name} are not of its shape: {error}"
                ) from error
        return found

    def _cut_rows(self, layer: Any, a: torch.Tensor, shard: Any) -> torch.Tensor:
        data = a.new_zeros(sum(self.parameters.sizes), a.shape[1])
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=self.loader)
        return self._cut(layer, parameter, a, shard)

    def _cut_columns(self, layer: Any, b: torch.Tensor) -> torch.Tensor:
        if b.shape[1] == self.parameters.n_in:
            return b
        data = b.new_zeros(b.shape[0], self.parameters.n_in)
        parameter = RowvLLMParameter(data=data, input_dim=1, weight_loader=self.loader)
        return self._cut(layer, parameter, b, None)

    def _cut(self, layer: Any, parameter: Any, whole: torch.Tensor, shard: Any) -> torch.Tensor:
        parameter.tp_rank, parameter.tp_size = layer.tp_rank, layer.tp_size
        self.loader(parameter, whole, *(() if shard is None else (shard,)))
        data: torch.Tensor = parameter.data
        return data


def _is_made_up() -> bool:
    """Whether vLLM was told to fill the model with random numbers."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"

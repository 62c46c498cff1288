"""Others' 4-bit products, where they are installed: random codes, which speed does not care for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Make = Callable[[int, int, torch.device], Callable[[torch.Tensor], torch.Tensor]]
GROUP = 128


def marlin_nvfp4(
    n_out: int, n_in: int, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's Marlin, W4A16 of NVFP4.

    Source: vllm 0.32, quantization/utils/marlin_utils_fp4.py, called as its own layer does.
    """
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
    )

    layer: Any = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = n_out, n_in
    layer.params_dtype = torch.bfloat16
    codes = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(n_out, n_in // 16, device=device).add(1).to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(
        torch.ones((), device=device), requires_grad=False
    )
    marlin_utils_fp4.prepare_fp4_layer_for_marlin(layer)
    workspace = marlin_make_workspace_new(device)

    def call(x: torch.Tensor) -> torch.Tensor:
        return marlin_utils_fp4.apply_fp4_marlin_linear(
            input=x,
            weight=layer.weight,
            weight_scale=layer.weight_scale,
            weight_global_scale=layer.weight_global_scale,
            workspace=workspace,
            size_n=n_out,
            size_k=n_in,
        )

    return call


def gemlite_int4(
    n_out: int, n_in: int, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """gemlite's W4A16 of INT4 in groups of 128, with its own tuning.

    Source: mobiusml/gemlite, gemlite/helper.py: the layer as its helpers make it.
    """
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        4,
        group_size=GROUP,
        in_features=n_in,
        out_features=n_out,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    codes = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, device=device)
    scales = torch.rand(n_out * n_in // GROUP, 1, device=device).bfloat16()
    layer.pack(codes, scales, torch.full_like(scales, 8), bias=None, contiguous=True)
    return layer


RIVALS: dict[str, Make] = {"marlin nvfp4": marlin_nvfp4, "gemlite int4": gemlite_int4}

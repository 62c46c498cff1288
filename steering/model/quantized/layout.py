"""Quantised matrices as compressed-tensors stores them, and back.

| ours                      | theirs                 | tensors beside `weight_packed`              |
|---------------------------|------------------------|---------------------------------------------|
| nvfp4                     | nvfp4-pack-quantized   | weight_scale (E4M3), weight_global_scale    |
| mxfp4                     | mxfp4-pack-quantized   | weight_scale (E8M0)                         |
| int4, int4-asym           | pack-quantized         | weight_scale, weight_shape, (..zero_point)  |
| fp8 (`weight`, E4M3)      | float- or naive-quant. | weight_scale                                |
| fp4-m1, groups of 32 k    | as mxfp4               | exact, see kernels/formats/recast.py        |
| fp4-m1, fp4-m2, of 16 k   | as nvfp4               | exact                                       |

Their global scale is the reciprocal of our tensor scale, their int4 words are our bytes four at a
time, and zero points are packed along the rows.

Source: compressed-tensors 0.15 to 0.20, `compressors/{nvfp4,mxfp4,pack_quantized,naive_quantized}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.kernels.formats import Fp8Matrix, Packed, Parts, format_named, fp8, nibbles
from trimtab.kernels.formats.recast import as_mxfp4, as_nvfp4

Matrix = Packed | Fp8Matrix

WEIGHT = "weight"
PACKED = "weight_packed"
SCALE = "weight_scale"
GLOBAL_SCALE = "weight_global_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"
SUFFIXES = (WEIGHT, PACKED, SCALE, GLOBAL_SCALE, ZERO_POINT, SHAPE)
# Of activations whose scale was measured in advance; the activations are quantised here as they
# come, or not at all.
UNUSED_SUFFIXES = ("input_global_scale", "input_scale", "input_zero_point")
_WORD = 8  # codes in an int32


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored.

    Attributes:
        format: `nvfp4`, `mxfp4`, `int4`, `int4-asym` or `fp8`.
        group_size: columns that share a scale; None where a whole row does.
    """

    format: str
    group_size: int | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names of the tensors, after the module's."""
        return {
            "nvfp4": (PACKED, SCALE, GLOBAL_SCALE),
            "mxfp4": (PACKED, SCALE),
            "int4": (PACKED, SCALE, SHAPE),
            "int4-asym": (PACKED, SCALE, ZERO_POINT, SHAPE),
            "fp8": (WEIGHT, SCALE),
        }[self.format]

    def config_group(self, targets: list[str], *, has_fp8_activations: bool) -> dict[str, Any]:
        """Return the group of `quantization_config` that describes such matrices.

        Args:
            targets: names of modules, or of their class.
            has_fp8_activations: whether the activations of FP8 matrices are FP8 too. The layout
                knows no 4-bit weights with FP8 activations for NVFP4; that fact is our own key's.
        """
        weights: dict[str, Any] = {"symmetric": self.format != "int4-asym", "dynamic": False}
        activations: dict[str, Any] | None = None
        if self.format == "fp8":
            weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
            stored = "naive-quantized"
            if has_fp8_activations:
                stored = "float-quantized"
                activations = {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                }
        elif self.format == "nvfp4":
            weights |= {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
            weights |= {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
            stored = "nvfp4-pack-quantized"
        elif self.format == "mxfp4":
            weights |= {"num_bits": 4, "type": "float", "strategy": "group"}
            weights |= {"group_size": 32, "scale_dtype": "torch.uint8"}
            stored = "mxfp4-pack-quantized"
        else:
            weights |= {"num_bits": 4, "type": "int"}
            whole = self.group_size is None
            weights |= {"strategy": "channel" if whole else "group"}
            weights |= {} if whole else {"group_size": self.group_size}
            weights |= {} if weights["symmetric"] else {"zp_dtype": "torch.int8"}
            stored = "pack-quantized"
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": stored,
        }


def layout_of(matrix: Matrix) -> Layout:
    """Return how a matrix is stored.

    Raises:
        ValueError: it fits none of the layouts.
    """
    if isinstance(matrix, Fp8Matrix):
        return Layout("fp8", None)
    stored = _storable(matrix, tensor_scale=None)
    if stored.format.startswith("int4") and stored.group_size == stored.shape[1]:
        return Layout(stored.format, None)
    return Layout(stored.format, stored.group_size)


def to_tensors(
    matrix: Matrix, *, tensor_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return a matrix's tensors by suffix, as compressed-tensors names and stores them.

    Args:
        matrix: the matrix.
        tensor_scale: for M1 and M2, the power of two that matrices multiplied as one must share;
            None means the matrix's own.

    Raises:
        ValueError: it fits none of the layouts.
    """
    if isinstance(matrix, Fp8Matrix):
        return {WEIGHT: matrix.values, SCALE: matrix.scale}
    stored = _storable(matrix, tensor_scale=tensor_scale)
    if not stored.format.startswith("int4"):
        tensors = {PACKED: stored.packed, SCALE: stored.scales}
        if stored.tensor_scale is not None:
            tensors[GLOBAL_SCALE] = (1.0 / stored.tensor_scale).reshape(1)
        return tensors
    tensors = {
        PACKED: _retyped(stored.packed, torch.int32),
        SCALE: stored.scales,
        SHAPE: torch.tensor(stored.shape),
    }
    if stored.zeros is not None:
        tensors[ZERO_POINT] = _packed_zeros(stored.zeros)
    return tensors


def from_tensors(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Matrix:
    """Return the matrix of stored tensors.

    Args:
        layout: how they are stored.
        tensors: by suffix.

    Raises:
        ValueError: a tensor is missing, or has another shape or type than the layout says.
    """
    missing = [suffix for suffix in layout.suffixes if suffix not in tensors]
    if missing:
        raise ValueError(f"{layout.format}: {', '.join(missing)} missing")
    scale = tensors[SCALE]
    if layout.format == "fp8":
        return _fp8(tensors[WEIGHT], scale)
    packed = tensors[PACKED]
    if layout.format in ("nvfp4", "mxfp4"):
        tensor_scale = None
        if layout.format == "nvfp4":
            tensor_scale = _tensor_scale(tensors[GLOBAL_SCALE])
        return format_named(layout.format).stored(packed, Parts(scale, tensor_scale))
    if packed.dtype != torch.int32 or packed.ndim != 2:
        raise ValueError(f"{layout.format}: {PACKED} is {packed.dtype} {tuple(packed.shape)}")
    shape = tensors[SHAPE].tolist()
    if shape != [packed.shape[0], packed.shape[1] * _WORD]:
        raise ValueError(f"{layout.format}: {tuple(packed.shape)} words for a {shape} matrix")
    n_out, n_in = shape
    zeros = None
    if layout.format == "int4-asym":
        zeros = _unpacked_zeros(tensors[ZERO_POINT], n_out=n_out, n_groups=scale.shape[-1])
    fmt = format_named(layout.format, group_size=layout.group_size or n_in)
    return fmt.stored(_retyped(packed, torch.uint8), Parts(scale, zeros=zeros))


def _storable(packed: Packed, *, tensor_scale: torch.Tensor | None) -> Packed:
    """Return the matrix in a format that has a layout."""
    if packed.format.startswith("int4"):
        if packed.shape[1] % _WORD:
            raise ValueError(f"{packed.format}: {packed.shape[1]} columns fill no 32-bit words")
        return packed
    if packed.format in ("nvfp4", "mxfp4"):
        return packed
    if packed.format == "fp4-m1" and packed.group_size % 32 == 0:
        return as_mxfp4(packed)
    return as_nvfp4(packed, tensor_scale=tensor_scale)


def _tensor_scale(reciprocal: torch.Tensor) -> torch.Tensor:
    if reciprocal.numel() != 1 or reciprocal.dtype != torch.float32:
        raise ValueError(f"nvfp4: {GLOBAL_SCALE} is {reciprocal.dtype} {tuple(reciprocal.shape)}")
    value = reciprocal.reshape(())
    if not bool(torch.isfinite(value)) or bool(value <= 0):
        raise ValueError(f"nvfp4: {GLOBAL_SCALE} is {float(value)}, expected a positive number")
    return 1.0 / value


def _fp8(values: torch.Tensor, scale: torch.Tensor) -> Fp8Matrix:
    if values.dtype != fp8.DTYPE or values.ndim != 2:
        raise ValueError(f"fp8: {WEIGHT} is {values.dtype} {tuple(values.shape)}")
    if not scale.is_floating_point() or scale.numel() not in (1, values.shape[0]):
        raise ValueError(f"fp8: {SCALE} is {scale.dtype} {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError("fp8: a scale is negative, infinite or NaN")
    # One scale for the matrix is as many equal ones as it has rows.
    return Fp8Matrix(values, scale.float().reshape(-1, 1).expand(values.shape[0], 1).contiguous())


def _packed_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Return zero points `[n_out, n_groups]`, uint8, as int32 `[ceil(n_out / 8), n_groups]`."""
    padded = torch.nn.functional.pad(zeros.t(), (0, -zeros.shape[0] % _WORD))
    return _retyped(nibbles.pack(padded), torch.int32).t().contiguous()


def _unpacked_zeros(words: torch.Tensor, *, n_out: int, n_groups: int) -> torch.Tensor:
    if words.dtype != torch.int32 or tuple(words.shape) != (-(-n_out // _WORD), n_groups):
        raise ValueError(f"int4-asym: {ZERO_POINT} is {words.dtype} {tuple(words.shape)}")
    codes = nibbles.unpack(_retyped(words.t(), torch.uint8))
    return codes[:, :n_out].t().contiguous()


def _retyped(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the same bytes, row by row, as another type."""
    # Flat, because a matrix of one row or column is contiguous with any stride, and `view` minds.
    return matrix.reshape(-1).view(dtype).view(matrix.shape[0], -1)

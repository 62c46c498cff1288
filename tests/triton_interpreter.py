"""Triton's interpreter with the numbers of a GPU, so that kernels can be tested on a CPU.

The interpreter keeps bfloat16 and float8 as bare integers. Up to 3.7.1 it forgets this in most
places: arithmetic, comparisons and `tl.dot` on bfloat16 work on the integers, a cast to bfloat16
truncates, one to float8 loses the carry out of the mantissa, flushes subnormals and does not
saturate, and `autotune` asks for a GPU. Nothing of this is an error, the numbers are just wrong.
`test_triton_interpreter.py` shows each, so that this file can go once Triton has mended them.

`TRITON_INTERPRET=1` must be set before triton is imported; conftest.py does that where there is no
GPU, and calls `mend` before the first test marked `triton`. Compiling ahead of time needs a process
without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

KNOWN = ("3.6", "3.7")
"""Triton's versions whose interpreter this has been tried with."""


def is_known() -> bool:
    """Return whether the installed Triton is one that `mend` mends."""
    try:
        return version("triton").startswith(KNOWN)
    except PackageNotFoundError:
        return False


def is_interpreted() -> bool:
    """Return whether kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiling_environment() -> dict[str, str]:
    """Return the environment of a process in which kernels are compiled, GPU or not."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def mend() -> None:
    """Make the interpreter's numbers right, for the rest of the process."""
    if not _stock:
        for owner, name, mended in _replacements():
            _stock.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, mended)


@contextmanager
def stock() -> Iterator[None]:
    """Give Triton its own interpreter back for the time of the block."""
    mended = [(owner, name, owner.__dict__[name]) for owner, name, _ in _stock]
    for owner, name, original in _stock:
        delattr(owner, name) if original is None else setattr(owner, name, original)
    try:
        yield
    finally:
        for owner, name, ours in mended:
            setattr(owner, name, ours)


# (class, attribute, what Triton has there)
_stock: list[tuple[Any, str, Any]] = []
# numpy's functions that are right on a narrow type's bits
_ON_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift", "where")


def _replacements() -> list[tuple[Any, str, Any]]:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle
    numpy_of, nearest = interpreter._get_np_dtype, interpreter._ir.ROUNDING_MODE.RTNE
    narrow = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }

    def widened(handle: Any) -> Any:
        """Return a handle's values as float32 if they are of a narrow type."""
        kind = narrow.get(handle.dtype.scalar)
        if kind is None or handle.data.dtype.kind == "f":
            return handle
        bits = torch.from_numpy(np.array(handle.data, order="C"))
        return handle_of(bits.view(kind).float().numpy(), tl.float32)

    def rounded(values: np.ndarray, dtype: Any) -> Any:
        """Return floats as a handle of a type: to nearest even, float8 saturating as PTX's does."""
        kind = narrow.get(dtype.scalar)
        if kind is None:
            return handle_of(values.astype(numpy_of(dtype.scalar)), dtype.scalar)
        exact = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        if kind.itemsize == 1:
            largest = torch.finfo(kind).max
            exact = exact.clamp(-largest, largest)  # NaN stays NaN
        bits = exact.to(kind).view(torch.uint8 if kind.itemsize == 1 else torch.uint16)
        return handle_of(bits.numpy(), dtype.scalar)

    def is_narrow(*handles: Any) -> bool:
        return any(handle.dtype.scalar in narrow for handle in handles)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if is_narrow(source) or dtype.scalar in narrow:
            return rounded(widened(source).data, dtype)
        return stock_cast(self, source, dtype)

    def create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        if rounding is not None and rounding != nearest:
            return stock_fp_to_fp(self, source, dtype, rounding)
        return rounded(widened(source).data, dtype)

    def with_float32(operation: Callable[..., Any], n_operands: int) -> Callable[..., Any]:
        """Return one on float32 whose result is rounded to the last operand's type."""

        def mended(self: Any, *args: Any) -> Any:
            operands, rest = args[:n_operands], args[n_operands:]
            is_on_bits = any(getattr(one, "__name__", "") in _ON_BITS for one in rest)
            if not is_narrow(*operands) or is_on_bits:
                return operation(self, *args)
            result = operation(self, *map(widened, operands), *rest)
            dtype = operands[-1].dtype
            if result.data.dtype.kind != "f":  # a comparison
                return handle_of(result.data, dtype.scalar)
            return rounded(result.data, dtype)

        return mended

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return stock_dot(self, widened(a), widened(b), accumulator, *options)

    def sum_up(self: Any, summand: Any) -> Any:
        # A GPU rounds after every addition; kernels had better sum in float32 anyway.
        if not is_narrow(summand.handle):
            return stock_sum(self, summand)
        values = widened(summand.handle).data
        total = np.asarray(np.sum(values, axis=self.axis, keepdims=self.keep_dims))
        bits = rounded(total, summand.dtype).data
        return self.to_tensor(bits if bits.shape else bits.item(), summand.dtype)

    def get_bf16(self: Any, value: float) -> Any:
        return rounded(np.array([value]), tl.bfloat16)

    def run_quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        # numpy warns of 0/0 in lanes that a mask leaves out; a GPU does not.
        with np.errstate(all="ignore"):
            return stock_call(self, *args, **kwargs)

    def patch_tensor(tensor: Any, *args: Any) -> None:
        # numpy has deprecated int() of an array of one, with which 3.6 counts its loops.
        stock_patch_tensor(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    executor, reduction = interpreter.GridExecutor, interpreter.ReduceOps
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    stock_dot, stock_call = builder.create_dot, executor.__call__
    stock_patch_tensor, stock_sum = interpreter._patch_lang_tensor, reduction.sum
    return [
        (builder, "cast_impl", cast_impl),
        (builder, "create_fp_to_fp", create_fp_to_fp),
        (builder, "binary_op", with_float32(builder.binary_op, 2)),
        (builder, "unary_op", with_float32(builder.unary_op, 1)),
        (builder, "ternary_op", with_float32(builder.ternary_op, 3)),
        (builder, "create_fma", with_float32(builder.create_fma, 3)),
        (builder, "create_rsqrt", with_float32(builder.create_rsqrt, 1)),
        (builder, "create_dot", create_dot),
        (builder, "get_bf16", get_bf16),
        (reduction, "sum", sum_up),
        (executor, "__call__", run_quietly),
        (interpreter, "_patch_lang_tensor", patch_tensor),
        # The first configuration is as good as any: it takes the time of none.
        (Autotuner, "do_bench", property(lambda self: lambda call, quantiles: (0.0, 0.0, 0.0))),
    ]

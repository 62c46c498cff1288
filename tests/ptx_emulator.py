"""Inline PTX on a CPU, so that Triton's interpreter runs kernels that have some.

The interpreter knows no `inline_asm_elementwise`. Here the text is read instruction by instruction
and done on numpy's uint32 arrays, all elements at once. What an instruction does is from the PTX
ISA; one that is not in the table is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Registers = dict[str, np.ndarray]

_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run(text: str, inputs: list[np.ndarray], n_outputs: int) -> list[np.ndarray]:
    """Do a block of PTX.

    Args:
        text: instructions with operands `$0`, `$1`, ...: outputs first, as Triton counts them.
        inputs: 32-bit registers, uint32 of one shape.
        n_outputs: how many of the operands are results.

    Returns:
        The results, uint32.

    Raises:
        NotImplementedError: an instruction, or a form of it, that is not known here.
        KeyError: a register that was never written.
    """
    shape = inputs[0].shape
    registers = {f"${n_outputs + i}": values for i, values in enumerate(inputs)}
    for statement in re.split(r"[;{}]", text):
        words = " ".join(statement.split())
        if not words or words.startswith(".reg"):
            continue
        opcode, rest = words.split(" ", 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        if opcode not in _INSTRUCTIONS:
            raise NotImplementedError(f"PTX instruction {opcode}")
        values = [_value(operand, registers, shape) for operand in operands]
        registers[target] = _INSTRUCTIONS[opcode](*values)
    return [registers[f"${i}"] for i in range(n_outputs)]


def _value(operand: str, registers: Registers, shape: tuple[int, ...]) -> np.ndarray:
    if re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", operand):
        return np.full(shape, int(operand, 0), np.uint32)
    return registers[operand]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Pick four of the eight bytes of b:a; a selector's bit 3 asks for the byte's sign instead."""
    whole = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        places = (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = ((whole >> places) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look each bit up in a table of eight, by the bits of a, b and c."""
    bits, result = int(table.flat[0]), np.zeros_like(a)
    for i in range(8):
        if bits >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _mad(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


def _pairwise(operation: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., Any]:
    """Return an operation on both halves of registers.

    It is done in float32 and rounded: with 24 bits for at most 11 the second rounding can't differ.
    """

    def done(*operands: np.ndarray) -> np.ndarray:
        halves = [
            torch.from_numpy(np.array(values, order="C").view(np.int16)).view(dtype).float()
            for values in operands
        ]
        return operation(*halves).to(dtype).view(torch.int16).numpy().view(np.uint32)

    return done


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "add.u32": np.add,
    "sub.u32": np.subtract,
    "mad.lo.u32": _mad,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    **{f"mul.rn.{name}": _pairwise(torch.mul, dtype) for name, dtype in _HALVES.items()},
    **{f"sub.rn.{name}": _pairwise(torch.sub, dtype) for name, dtype in _HALVES.items()},
}


def install() -> None:
    """Teach Triton's interpreter inline PTX, for the rest of the process."""
    from triton.runtime import interpreter

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> Any:
        n_outputs = constraints.count("=")
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        inputs = [part for value in values for part in _registers(value.data, shape, pack)]
        left = run(text, inputs, n_outputs)
        results = []
        for block in types:
            kind = block.scalar
            taken = pack * kind.primitive_bitwidth // 32
            # Neighbours lie in one register, the first in its lowest bits.
            words = np.ascontiguousarray(np.stack(left[:taken], axis=-1))
            left = left[taken:]
            data = words.view(interpreter._get_np_dtype(kind)).reshape(shape)
            results.append(interpreter.TensorHandle(data, kind))
        return _Call(results)

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


class _Call:
    """What Triton expects of the builder: results by number."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def get_result(self, index: int) -> Any:
        return self._results[index]


def _registers(data: np.ndarray, shape: tuple[int, ...], pack: int) -> list[np.ndarray]:
    """Return packs of neighbouring elements of the last axis as 32-bit registers."""
    if pack * data.itemsize % 4:
        raise NotImplementedError(f"a pack of {pack} elements of {data.itemsize} bytes")
    whole = np.ascontiguousarray(np.broadcast_to(data, shape))
    packs = whole.reshape(*shape[:-1], shape[-1] // pack, pack).view(np.uint32)
    return [np.ascontiguousarray(packs[..., i]) for i in range(packs.shape[-1])]

"""One kernel compiled without a GPU, and what its machine code says."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import layouts
import sass

SHARED_BYTES = 232_448
"""Of a Hopper multiprocessor, for one program. `triton.compile` does not look."""
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Case:
    """A kernel with types and constants, as a launch would specialise it.

    Attributes:
        name: in reports.
        kernel: `module:function`.
        arguments: types by name, `*bf16`, `i32`; in any order.
        constants: values of `tl.constexpr` arguments, and of arguments that are None.
        aligned: arguments that are multiples of 16, which decides how wide loads are.
        warps: of a program.
        weights: that a program decodes in one turn of its hot loop, or None.
        most_per_weight: instructions; the gate.
        has_product: tensor cores must be at work in the hot loop.
        holds: text that must be in the PTX.
        architecture: 90 for Hopper, 100 and 120 for Blackwell.
        is_gated: one of the cases that the tests look at.
    """

    name: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    weights: int | None = None
    most_per_weight: float | None = None
    has_product: bool = False
    holds: str = ""
    architecture: int = 90
    is_gated: bool = True


@dataclass(frozen=True)
class Compiled:
    """What a case became.

    Attributes:
        name: the case's.
        architecture: compiled for.
        registers: of a thread.
        spills: instructions that move registers to local memory or back, in the whole kernel.
        shared_bytes: of a program.
        tensor_instructions: in the hot loop; in the whole kernel if it has no loop.
        loop_instructions: in the hot loop; 0 if there is none.
        per_weight: instructions of the hot loop for each weight it decodes.
        int_per_weight: those of them that go through the integer pipe, half as wide.
        missed: gates, in words.
    """

    name: str
    architecture: int
    registers: int
    spills: int
    shared_bytes: int
    tensor_instructions: int
    loop_instructions: int
    per_weight: float | None
    int_per_weight: float | None
    missed: list[str]


def compile_ahead(case: Case) -> Compiled:
    """Compile a case and look at its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    types = {**case.arguments, **dict.fromkeys(case.constants, "constexpr")}
    if set(types) != set(kernel.arg_names):
        odd = set(types) ^ set(kernel.arg_names)
        raise ValueError(f"{case.name}: arguments that only one side has: {', '.join(odd)}")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=case.constants,
        attrs={(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in case.aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", case.architecture, 32),
        options={"num_warps": case.warps},
    )
    code = sass.read(made.asm["cubin"])
    hot = code.hot_loop()
    body = hot or code.instructions
    per_weight = int_per_weight = None
    if case.weights is not None:
        each = case.weights / (32 * case.warps)
        per_weight, int_per_weight = len(hot) / each, sass.count_int(hot) / each
    result = Compiled(
        name=case.name,
        architecture=case.architecture,
        registers=code.registers,
        spills=sass.count_spills(code.instructions),
        shared_bytes=made.metadata.shared,
        tensor_instructions=sass.count_tensor(body),
        loop_instructions=len(hot),
        per_weight=per_weight,
        int_per_weight=int_per_weight,
        missed=layouts.too_few_neighbours(made.asm["ttgir"]),
    )
    result.missed.extend(_missed(case, result))
    if sass.are_serialized(hot):
        result.missed.append("tensor-core instructions wait for one another")
    if case.holds not in made.asm["ptx"]:
        result.missed.append(f"no {case.holds} in the PTX")
    return result


def _missed(case: Case, result: Compiled) -> list[str]:
    found = []
    if result.spills:
        found.append(f"{result.spills} spills")
    if result.registers > MOST_REGISTERS:
        found.append(f"{result.registers} registers")
    if result.shared_bytes > SHARED_BYTES:
        found.append(f"{result.shared_bytes} bytes of shared memory, {SHARED_BYTES} are allowed")
    if case.has_product and not result.tensor_instructions:
        found.append("no tensor-core instruction in the hot loop")
    most, per_weight = case.most_per_weight, result.per_weight
    if most is not None and (per_weight is None or not 0 < per_weight <= most):
        found.append(f"{per_weight:.2f} instructions a weight, {most} are allowed")
    return found

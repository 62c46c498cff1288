"""Reading a cubin: instructions, registers, the hot loop. The tools come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Opcodes of the integer pipe, 64 lanes a clock and multiprocessor where others have 128.
_INT = re.compile(
    "BFE|BMSK|BREV|FLO|IABS|IADD3?|IMNMX|ISETP|LEA|LOP3?|PLOP3|POPC|PRMT|SEL|SGXT|SHF|SHL|SHR|"
    "VIADD|VIMNMX"
)
_TENSOR = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC\w*MMA|OMMA)$")
_SPILL = frozenset(("LDL", "STL"))
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BACK = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        instructions: in order, predicates included.
        labels: index of the instruction after each label.
    """

    registers: int
    instructions: list[str]
    labels: dict[str, int]

    def hot_loop(self) -> list[str]:
        """Return the body of the loop with tensor-core instructions, or else of the longest."""
        bodies = [
            self.instructions[self.labels[jump[1]] : at + 1]
            for at, text in enumerate(self.instructions)
            if (jump := _BACK.search(text)) and self.labels.get(jump[1], at) < at
        ]
        return max(bodies, key=lambda body: (count_tensor(body) > 0, len(body)), default=[])


def read(cubin: bytes) -> Code:
    """Return the code of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        text = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {usage.strip()[:200]}")
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _LINE.match(line):
            instructions.append(instruction[1].strip())
    return Code(int(found[1]), instructions, labels)


def opcode(instruction: str) -> str:
    """Return `LOP3` of `@!P0 LOP3.LUT R0, ...`."""
    return _PREDICATE.sub("", instruction).split()[0].split(".")[0]


def count_int(instructions: Iterable[str]) -> int:
    """Return how many go through the integer pipe."""
    return sum(bool(_INT.fullmatch(opcode(one))) for one in instructions)


def count_spills(instructions: Iterable[str]) -> int:
    """Return how many move registers to local memory or back."""
    return sum(opcode(one) in _SPILL for one in instructions)


def count_tensor(instructions: Iterable[str]) -> int:
    """Return how many are products of tensor cores."""
    return sum(bool(_TENSOR.match(opcode(one))) for one in instructions)


def are_serialized(instructions: Iterable[str]) -> bool:
    """Whether each of Hopper's products waits for the one before.

    ptxas says so in a note that Triton keeps to itself (C7510, C7515); in the code every product is
    then between a WARPGROUP.ARRIVE and a wait of its own.
    """
    body = list(instructions)
    products = sum(opcode(one) in ("HGMMA", "QGMMA", "IGMMA") for one in body)
    arrivals = sum("WARPGROUP.ARRIVE" in one for one in body)
    return products > 1 and arrivals >= products


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True
    ).stdout

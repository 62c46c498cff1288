"""Kernels compiled for Hopper without a GPU: what their machine code must not lose."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import compiling_environment

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "kernels_ahead.py"


def test_gates(tmp_path: Path) -> None:
    """Registers that spill, a decode that grew, or a product that fell off the tensor cores.

    Another process, because in this one Triton interprets kernels.
    """
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--quick"],
        capture_output=True,
        text=True,
        env=compiling_environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout.startswith("["), done.stderr
    results = json.loads(done.stdout)
    missed = {one["name"]: one["missed"] for one in results if one["missed"]}
    assert not missed
    # A gate that looks at nothing is always met.
    of_weights = [one for one in results if one["per_weight"] is not None]
    assert {one["name"].split()[0] for one in of_weights} == {"w4a8", "w4a16"}
    assert all(one["tensor_instructions"] > 0 and one["spills"] == 0 for one in of_weights)
    assert all(one["per_weight"] <= 4.2 for one in of_weights)
    assert all(one["per_weight"] <= 3.1 for one in of_weights if "w4a8" in one["name"])


def test_packs_of_strangers_are_seen() -> None:
    """A layout whose registers go down the rows first gives inline PTX codes of two rows."""
    spec = importlib.util.spec_from_file_location("layouts", BENCHMARKS / "ahead" / "layouts.py")
    assert spec is not None
    assert spec.loader is not None
    layouts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layouts)
    call = (
        'tt.elementwise_inline_asm "x" {{constraints = "r", packed_element = 4 : i32, pure = true}}'
        " %a, %b : tensor<64x128xi8, {layout}>, tensor<64x128xi32, {layout}> -> x\n"
    )
    fragment = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>"
    rows_first = "#ttg.linear<{register = [[0, 1], [8, 0], [0, 2]], lane = []}>"
    assert not layouts.too_few_neighbours(call.format(layout=fragment))
    aliased = f"#l = {rows_first}\n" + call.format(layout="#l")
    assert "2 neighbours" in layouts.too_few_neighbours(aliased)[0]

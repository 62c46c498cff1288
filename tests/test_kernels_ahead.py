"""Kernels compiled for Hopper without a GPU: what their machine code must not lose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import compiling_environment

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernels_ahead.py"


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

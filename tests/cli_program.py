"""The command line as a program, and a vector to give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.vector import VectorArtifact

PROGRAM = "import sys; from trimtab.ui.cli import main; main(sys.argv[1:])"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def program(*args: str, **environment: str) -> Done:
    """Run a command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *args],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def vector(name: str = "warm", *, size: float = 1.0, is_calibrated: bool = True) -> VectorArtifact:
    """A vector for the default model that no model was needed for."""
    points = [
        {"scale": s, "margin": 0.3 * s, "moved": 1.0, "rise": 0.08 * s * s, "repetition": 0.0}
        for s in (-1.0, 0.0, 1.0, 4.0)
    ]
    knee = {"layers": [1], "dose": 0.1, "is_clean": True, "problem": None}
    calibration = {
        "criteria": {"max_rise": 0.08},
        "n_pairs": 12,
        "candidates": [{"layers": [1], "dose": 0.1, "effect": 0.6}],
        "curve": points,
        "knee": knee,
    }
    return VectorArtifact(
        id=name,
        model=ModelRef("smollm2", "f" * 64, "llama", 8, 4),
        layers=(1, 2),
        directions=torch.full((2, 8), size),
        default_layers=(1,),
        method="mean_difference",
        calibration=calibration if is_calibrated else None,
        description="kind and close",
    )

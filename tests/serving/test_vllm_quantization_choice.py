"""Which quantised checkpoints are ours to run on vLLM."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from trimtab.serving.engines.vllm.quantization_choice import choice, four_bit_format
from trimtab.steering.errors import ModelLoadError

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def config(*weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    groups = {
        f"group_{n}": {"targets": ["Linear"], "weights": one, "input_activations": inputs}
        for n, one in enumerate(weights)
    }
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize("is_cpu", [True, False])
def test_our_folders_are_ours_everywhere(is_cpu: bool) -> None:
    """vLLM's own method without the FP8 inputs or the factors that the folder was made with."""
    for asked in (None, "trimtab"):
        assert choice(config(INT4), asked, {"scheme": "int4"}, is_cpu=is_cpu) == "trimtab"
        assert choice(config(NVFP4, FP8), asked, {"scheme": "w4a8"}, is_cpu=is_cpu) == "trimtab"


def test_somebody_elses_folder_stays_vllms_unless_it_is_stuck(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another method than the user expects, on a device where vLLM has its own kernel."""
    with caplog.at_level(logging.WARNING):
        for weights in (NVFP4, MXFP4, INT4, FP8):
            assert choice(config(weights), None, None, is_cpu=False) is None
        assert choice(config(INT4), None, None, is_cpu=True) is None
        assert choice(config(FP8), None, None, is_cpu=True) is None
        assert not caplog.messages
        assert choice(config(NVFP4, FP8), None, None, is_cpu=True) == "trimtab"
        assert choice(config(MXFP4), None, None, is_cpu=True) == "trimtab"
    assert ["no kernel for nvfp4" in caplog.messages[0], len(caplog.messages)] == [True, 2]


def test_quantised_inputs_of_others_are_not_left_out() -> None:
    """W4A4 run as W4A16: not what the checkpoint says, and no error either."""
    assert four_bit_format({"weights": NVFP4, "input_activations": NVFP4}) is None
    assert choice(config(NVFP4, inputs=NVFP4), None, None, is_cpu=True) is None
    with pytest.raises(ModelLoadError, match="group_0"):
        choice(config(NVFP4, inputs=TOKENS), "trimtab", None, is_cpu=False)


def test_asking_for_a_method_is_honoured_or_refused() -> None:
    """A method that was asked for by name and quietly not taken."""
    assert choice(config(INT4), "trimtab", None, is_cpu=False) == "trimtab"
    with pytest.raises(ModelLoadError, match="group_1"):
        choice(config(INT4, FP8), "trimtab", None, is_cpu=False)
    assert choice({"quant_method": "awq"}, "trimtab", None, is_cpu=False) is None  # vLLM refuses it
    theirs = "compressed-tensors"
    assert choice(config(INT4), theirs, {"scheme": "int4"}, is_cpu=False) is None
    assert choice(config(NVFP4), theirs, None, is_cpu=True) is None
    for facts, what in (({"activations": "fp8"}, "FP8"), ({"lorc": {"rank": 8}}, "low-rank")):
        with pytest.raises(ModelLoadError, match=what):
            choice(config(NVFP4), theirs, facts, is_cpu=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "int4"),
        ({"symmetric": False}, "int4-asym"),
        ({"group_size": 64, "actorder": "static"}, "int4"),
        ({"actorder": "group"}, None),
        ({"group_size": 20}, None),
        ({"strategy": "channel", "group_size": None}, None),
        ({"num_bits": 8}, None),
        ({"type": "float"}, None),
        ({"dynamic": True}, None),
    ],
    ids=str,
)
def test_a_format_is_known_by_all_it_says(change: dict[str, Any], expected: str | None) -> None:
    """A checkpoint whose columns are sorted, or whose groups differ, read as one of ours."""
    found = four_bit_format({"weights": INT4 | change})
    assert (found and found.name) == expected
    assert found is None or found.group_size == change.get("group_size", 128)

"""Which quantised checkpoints are ours to run on vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from quantized_toys import by_format, quantise, save_original

from trimtab.serving.engines.vllm.engine import VllmEngine
from trimtab.serving.engines.vllm.quantization_choice import check_folder, choice, readable
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.profile import ref_without_weights
from trimtab.steering.model.quantized import Layout, QuantizationFacts
from trimtab.steering.model.quantized.groups import Group

NVFP4, MXFP4, INT4, FP8 = (
    Layout(format, size).config_group(["Linear"], has_fp8_activations=False)
    for format, size in (("nvfp4", 16), ("mxfp4", 32), ("int4", 128), ("fp8", None))
)
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
OURS = QuantizationFacts("nvfp4").to_json(files={})


def config(*groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{n}": one for n, one in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named}


def lacks_fp4(group: Group) -> bool:
    """What vLLM on a CPU has no kernel for."""
    return group.layout.format in ("nvfp4", "mxfp4")


def chosen(config: dict[str, Any], asked: str | None = None, facts: Any = None) -> str | None:
    return choice(config, asked, facts, lacks=lacks_fp4)


def test_our_folders_are_ours_everywhere() -> None:
    """vLLM's own method without the FP8 activations or the corrections of the folder."""
    for asked in (None, "trimtab"):
        for groups in ([INT4], [NVFP4, FP8]):
            assert chosen(config(*groups), asked, OURS) == "trimtab"
            assert choice(config(*groups), asked, OURS, lacks=lambda group: False) == "trimtab"
    with pytest.raises(ModelLoadError, match="format 7"):
        chosen(config(INT4), None, {"format": 7})


def test_somebody_elses_folder_stays_vllms_unless_it_is_stuck(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another method than the user expects, on a device where vLLM has its own kernel."""
    with caplog.at_level(logging.WARNING):
        for group in (NVFP4, MXFP4, INT4, FP8):
            assert choice(config(group), None, None, lacks=lambda group: False) is None
        assert chosen(config(INT4)) is None
        assert chosen(config(FP8)) is None
        assert not caplog.messages
        assert chosen(config(NVFP4, FP8)) == "trimtab"
        assert chosen(config(MXFP4)) == "trimtab"
    assert ["no kernel for these nvfp4" in caplog.messages[0], len(caplog.messages)] == [True, 2]


def test_quantised_inputs_of_others_are_not_left_out() -> None:
    """W4A4 run as W4A16: not what the checkpoint says, and no error either."""
    four = NVFP4 | {"input_activations": NVFP4["weights"]}
    assert readable(four, stored=None) is None
    assert chosen(config(four)) is None
    with pytest.raises(ModelLoadError, match="group_1"):
        chosen(config(NVFP4, four), "trimtab")
    eight = readable(NVFP4 | {"input_activations": TOKENS}, stored=None)
    assert eight is not None
    assert eight.activations == "fp8"


def test_asking_for_a_method_is_honoured_or_refused() -> None:
    """A method that was asked for by name and quietly not taken."""
    assert chosen(config(INT4), "trimtab") == "trimtab"
    sparse = INT4 | {"weights": INT4["weights"] | {"num_bits": 2}}
    with pytest.raises(ModelLoadError, match="group_1"):
        chosen(config(INT4, sparse), "trimtab")
    assert chosen({"quant_method": "awq"}, "trimtab") is None  # which vLLM refuses
    theirs = "compressed-tensors"
    assert chosen(config(INT4), theirs, OURS) is None
    assert chosen(config(NVFP4), theirs) is None
    for change, what in (({"activations": "fp8"}, "FP8"), ({"lorc_rank": 8}, "low-rank")):
        with pytest.raises(ModelLoadError, match=what):
            chosen(config(NVFP4), theirs, OURS | change)


def folder(path: Path, *, rank: int = 0) -> Path:
    """Return a toy quantised into a folder below a path."""
    original = save_original(path / "original")
    facts = QuantizationFacts("nvfp4", lorc_rank=rank)
    quantise(original, path / "made", by_format("nvfp4"), facts=facts, rank=rank)
    return path / "made"


def test_a_folder_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    """A copy that stopped half way, found a minute later by an engine in its own words."""
    made = folder(tmp_path, rank=2)
    facts = check_folder(str(made))
    assert facts is not None
    assert facts.label == "nvfp4 lorc2"
    assert check_folder(str(tmp_path / "original")) is None
    assert check_folder("somebody/something") is None
    for file in sorted(made.glob("*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        with pytest.raises(ModelLoadError, match=file.name):
            check_folder(str(made))
        file.write_bytes(whole)
    file.unlink()
    with pytest.raises(ModelLoadError, match=f"{file.name} is missing"):
        asyncio.run(VllmEngine(str(made)).start())


def test_a_folder_that_only_vllm_reads_has_an_identity(tmp_path: Path) -> None:
    """INT8 with INT8 activations: refused by the app after vLLM has loaded it."""
    original = save_original(tmp_path / "original")
    path = original / "config.json"
    plain = ref_without_weights(str(original), model_id="toy")
    eight = INT4 | {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    facts = json.loads(path.read_text())
    facts["quantization_config"] = config(eight) | {"format": "int-quantized"}
    path.write_text(json.dumps(facts))
    ref = ref_without_weights(str(original), model_id="toy")
    assert (ref.fingerprint, ref.quantization) == (plain.fingerprint, "int-quantized")
    path.write_text(json.dumps(facts | {"trimtab_quantization": {"format": 7}}))
    with pytest.raises(ModelLoadError, match="format 7"):
        ref_without_weights(str(original), model_id="toy")

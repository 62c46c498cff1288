"""Loading quantised folders: the model that was quantised, in every architecture and scheme."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_toys import by_format, quantise, save_original
from torch import nn
from toys import TOYS

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import fingerprint, profile_model, ref_without_weights
from trimtab.steering.model.quantized import QuantizationFacts
from trimtab.steering.model.quantized import load as module
from trimtab.steering.model.quantized.linear import QuantizedLinear

IDS = torch.arange(3, 23)[None]
# GPT-2's layers are no nn.Linear: there is nothing to quantise.
ARCHITECTURES = [name for name in TOYS if name != "gpt2"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def with_weights(folder: Path, dense: dict[str, torch.Tensor]) -> Any:
    """Load the original and put other weights in, the plain way."""
    model = load_model(str(folder), device="cpu", dtype="float32").model
    words = {tuple(sorted(name.split("."))): name for name, _ in model.named_modules()}
    for name, weight in dense.items():
        model.get_submodule(words[tuple(sorted(name.split(".")))]).weight.copy_(weight)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_folder_is_the_quantised_model(name: str, tmp_path: Path) -> None:
    """A weight in another layer's place, a buffer left empty, a tie undone."""
    original = save_original(tmp_path / name, name=name)
    facts = QuantizationFacts("nvfp4", method="mse")
    dense = quantise(original, tmp_path / "q", by_format("nvfp4"), facts=facts)
    loaded = load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    expected = with_weights(original, dense)
    assert loaded.quantization == facts
    assert type(loaded.model) is type(expected)
    # Before they run: some architectures note in their configuration what the machine has not.
    assert fingerprint(loaded.model) == fingerprint(expected)
    ref = ref_without_weights(str(tmp_path / "q"), model_id="q")
    assert (ref.fingerprint, ref.quantization) == (fingerprint(expected), "nvfp4 mse")
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=0, atol=0)


SCHEMES: list[tuple[str, int | None, str, int]] = [
    ("nvfp4", None, "fp8", 0),
    ("nvfp4", None, "same", 4),
    ("nvfp4", None, "fp8", 4),
    ("mxfp4", None, "same", 0),
    ("fp4-m1", None, "same", 0),
    ("fp4-m2", None, "fp8", 0),
    ("int4", 32, "same", 0),
    ("int4-asym", 32, "same", 4),
    ("fp8", None, "same", 0),
    ("fp8", None, "fp8", 0),
]


@pytest.mark.parametrize(("fmt", "group_size", "activations", "rank"), SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_scheme_is_loaded_as_it_says(
    fmt: str, group_size: int | None, activations: Any, rank: int, dtype: str, tmp_path: Path
) -> None:
    """Rounded activations or a correction that the folder asks for and nobody applies."""
    original = save_original(tmp_path / "toy")
    facts = QuantizationFacts("x", activations=activations, lorc_rank=rank)
    quantiser = by_format(fmt, group_size=group_size)
    dense = quantise(original, tmp_path / "q", quantiser, facts=facts, rank=rank)
    loaded = load_model(str(tmp_path / "q"), device="cpu", dtype=dtype)
    expected = with_weights(original, dense)
    kept = load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    off = (logits(loaded.model).float() - logits(expected)).norm() / logits(expected).norm()
    # W4A8 rounds activations to three bits; bfloat16 eight; a missing correction is off by 1.
    assert off < (0.15 if activations == "fp8" else 0.03 if dtype == "bfloat16" else 1e-4)
    if activations == "fp8":
        assert off > 0.005, "nothing was rounded"
    is_plain = activations == "same" and not rank and not fmt.startswith("int4")
    layer = loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer) is (nn.Linear if is_plain else QuantizedLinear)
    assert fingerprint(loaded.model) == fingerprint(expected) == fingerprint(kept.model)
    said = loaded.reasons["weights"]
    assert said.startswith(facts.label)
    assert "on a CPU" in said
    assert ("kept packed" in said) == fmt.startswith("int4")
    assert ("rounded to FP8" in said) == (activations == "fp8")
    assert (f"rank {rank}" in said) == (rank > 0)


def test_a_quantised_model_can_be_profiled_and_moved_through(tmp_path: Path) -> None:
    """Layers found by running the model, and norms that steering's doses are relative to."""
    original = save_original(tmp_path / "toy")
    quantise(
        original, tmp_path / "q", by_format("int4", group_size=32), facts=QuantizationFacts("i")
    )
    loaded = load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    profile = profile_model(loaded.model, model_id="q", tokenizer=loaded.tokenizer)
    assert len(profile.layers) == 2
    assert profile.ref.quantization == "i"
    embedded = loaded.model.get_input_embeddings()(IDS).detach().requires_grad_()
    loaded.model(inputs_embeds=embedded).logits[0, -1, 5].backward()
    assert embedded.grad is not None
    assert (embedded.grad.abs().amax(-1) > 0).all()


def test_generation_settings_are_the_folders(tmp_path: Path) -> None:
    """An end-of-turn token that only generation_config.json names: the model never stops."""
    original = save_original(tmp_path / "toy")
    path = original / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 77]}))
    quantise(original, tmp_path / "q", by_format("nvfp4"), facts=QuantizationFacts("nvfp4"))
    loaded = load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    assert loaded.model.generation_config.eos_token_id == [2, 77]


def test_a_folder_of_others_says_what_is_left_out(tmp_path: Path) -> None:
    """llm-compressor's NVFP4 has 4-bit activations; running it without is a choice to be told."""
    original = save_original(tmp_path / "toy")
    dense = quantise(original, tmp_path / "q", by_format("nvfp4"), facts=QuantizationFacts("nvfp4"))
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    del config["trimtab_quantization"]
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = group["weights"] | {"dynamic": "local"}
    path.write_text(json.dumps(config))
    loaded = load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    torch.testing.assert_close(logits(loaded.model), logits(with_weights(original, dense)))
    assert "4-bit float activations are left as they are" in loaded.reasons["weights"]
    assert loaded.quantization == QuantizationFacts("nvfp4")
    assert ref_without_weights(str(tmp_path / "q"), model_id="q").quantization == "nvfp4"


def test_a_correction_of_nothing_is_refused(tmp_path: Path) -> None:
    """Factors of a layer that is not quantised would be left out in silence."""
    from safetensors.torch import load_file, save_file

    original = save_original(tmp_path / "toy")
    facts = QuantizationFacts("nvfp4", lorc_rank=2)
    quantise(original, tmp_path / "q", by_format("nvfp4"), facts=facts, rank=2)
    path = tmp_path / "q" / "lorc.safetensors"
    tensors = load_file(path)
    tensors |= {"lm_head.lorc_a": torch.ones(128, 2), "lm_head.lorc_b": torch.ones(2, 32)}
    save_file(tensors, path)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["trimtab_quantization"]["files"].pop("lorc.safetensors")
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"lm_head.*not quantised"):
        load_model(str(tmp_path / "q"), device="cpu", dtype="float32")


def test_packed_matrices_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrices dequantised before the first is put in: twice the memory for a moment."""
    original = save_original(tmp_path / "toy")
    quantise(original, tmp_path / "q", by_format("nvfp4"), facts=QuantizationFacts("nvfp4"))
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []
    prepared = module._prepared

    def counted(matrix: Any, **options: Any) -> Any:
        seen.append(weakref.ref(matrix))
        alive.append(sum(ref() is not None for ref in seen))
        return prepared(matrix, **options)

    monkeypatch.setattr(module, "_prepared", counted)
    load_model(str(tmp_path / "q"), device="cpu", dtype="float32")
    assert len(seen) == 14
    assert max(alive) <= 2, "the one in hand, and the one before it"

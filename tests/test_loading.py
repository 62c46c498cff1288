"""Loading a model: the right class, device and precision, each with a reason, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from toys import TOYS
from transformers import PreTrainedTokenizerFast

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model import loading, precision
from trimtab.steering.model.loading import LoadedModel, load_model


def save(name: str, folder: Path) -> Path:
    """Save a toy with a tokenizer of one word a token, as a Hugging Face folder."""
    vocab = {f"w{i}": i for i in range(128)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3").save_pretrained(folder)
    TOYS[name]().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "toy")


@pytest.mark.parametrize("name", TOYS)
def test_saved_then_loaded_equals_original(name: str, tmp_path: Path) -> None:
    """An architecture loaded by the wrong auto class, or with weights left out, answers noise."""
    loaded = load_model(str(save(name, tmp_path / name)), device="cpu", dtype="float32")
    original = TOYS[name]()
    ids = torch.arange(3, 23)[None]
    assert type(loaded.model) is type(original)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(input_ids=ids).logits, original(input_ids=ids).logits
        )


def test_loaded_model_is_ready_to_serve(folder: Path) -> None:
    """Dropout left on, or gradients kept, makes answers random and memory grow."""
    loaded = load_model(str(folder))
    assert isinstance(loaded, LoadedModel)
    assert loaded.id == "toy"
    assert loaded.source_path == folder
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {
        loaded.device.type
    }
    assert set(loaded.reasons) == {"model", "device", "dtype"}
    assert all(reason.endswith(".") for reason in loaded.reasons.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_explicit_dtype_is_honoured(folder: Path, dtype: str) -> None:
    """A precision that is asked for and not given is a silent fallback."""
    loaded = load_model(str(folder), device="cpu", dtype=dtype)
    assert loaded.dtype is getattr(torch, dtype)
    assert loaded.reasons["dtype"] == f"{dtype}, as asked."


@pytest.mark.parametrize(
    ("bfloat16_s", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)]
)
def test_cpu_takes_bfloat16_only_where_it_wins(
    monkeypatch: pytest.MonkeyPatch, bfloat16_s: float, chosen: torch.dtype
) -> None:
    """bfloat16 without instructions for it is several times slower, and less exact for nothing."""
    times = {torch.float32: [0.5, 0.5], torch.bfloat16: [bfloat16_s / 2] * 2}
    monkeypatch.setattr(precision, "_measure", lambda: times)
    dtype, reason = precision.cpu_dtype()
    assert dtype is chosen
    assert "ms in bfloat16" in reason


def test_auto_dtype_on_cpu_records_the_measurement(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice that is not told can't be questioned."""
    monkeypatch.setattr(loading, "cpu_dtype", lambda: (torch.bfloat16, "bfloat16, because I say."))
    loaded = load_model(str(folder), device="cpu")
    assert loaded.dtype is torch.bfloat16
    assert loaded.reasons["dtype"] == "bfloat16, because I say."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "Allowed: auto, bfloat16, float16, float32"),
        ({"device": "gpu"}, "is no device. Allowed"),
        ({"device": "cuda:99"}, "is not there: torch sees"),
        ({"device": "cpu:1"}, "is not there"),
        ({"revision": "v2"}, "has no revision 'v2'"),
    ],
)
def test_bad_option_is_refused(folder: Path, changes: dict[str, str], message: str) -> None:
    """A mistyped option must not end in another device or precision."""
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(folder), **changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", "Did you mean 'smollm2'"),
        ("nobody/nothing", "'nobody/nothing' cannot be loaded"),
        ("./nothing", "There is no folder './nothing'"),
        ("/nothing/here", "There is no folder"),
        ("", "No model was named"),
        (__file__, "is a file"),
        (str(Path(__file__).parent), "holds no config.json"),
    ],
)
def test_unknown_model_is_refused(model: str, message: str) -> None:
    """A library's traceback does not tell what to type instead."""
    with pytest.raises(ModelLoadError, match=message):
        load_model(model, device="cpu", dtype="float32")


def test_missing_weights_are_refused(folder: Path) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and the model babbles."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*down_proj"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_truncated_weights_are_refused(folder: Path) -> None:
    """A download that was cut off must be named, not crash."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_encoder_is_refused(folder: Path) -> None:
    """A model without a decoder has nothing to steer."""
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelLoadError, match="no decoder-only language model"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_code_in_a_checkpoint_is_never_run(folder: Path) -> None:
    """A checkpoint that brings code could do anything on the server's machine."""
    (folder / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: ...")
    with pytest.raises(ModelLoadError):
        load_model(str(folder), device="cpu", dtype="float32")
    assert not (folder / "ran").exists()


def test_toys_are_the_same_in_every_run(toy_llama: torch.nn.Module) -> None:
    """A toy that differs between runs makes a failing test impossible to repeat."""
    torch.manual_seed(99)
    again = TOYS["llama"]().state_dict()
    for name, weight in toy_llama.state_dict().items():
        assert torch.equal(weight, again[name])

"""Quantised folders: written in parts, looked at, refused by name when they are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_toys import by_format, quantise, save_original
from safetensors.torch import load_file, save_file

from trimtab.kernels.formats import FORMATS
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.quantized import QuantizationFacts, QuantizedFolderWriter
from trimtab.steering.model.quantized.folder import read_folder
from trimtab.steering.model.quantized.writer import INDEX_NAME

FACTS = QuantizationFacts("nvfp4", method="mse", trimtab_version="0", source={"id": "toy"})
PACKED = "model.layers.1.mlp.up_proj.weight_packed"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save_original(tmp_path / "toy")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    quantise(original, tmp_path / "quantised", by_format("nvfp4"), facts=FACTS)
    return tmp_path / "quantised"


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Any) -> None:
    """Change tensors of the file of layers, and forget what was recorded of it."""
    path = folder / "model-layers.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, lambda c: c.pop("trimtab_quantization"))


def test_facts_are_read_back(folder: Path) -> None:
    """A field that is written and not read makes a vector's record of its quantisation wrong."""
    read = read_folder(folder, verify=True)
    assert read is not None
    assert read.facts == FACTS
    assert len(read.groups) == 14
    assert not any("proj" in name for name in read.plain_names)


def test_an_ordinary_folder_is_none_of_ours(original: Path) -> None:
    """A model that is not quantised taken for a broken quantised one."""
    assert read_folder(original) is None


def test_files_are_parts_and_the_rest_of_the_source(folder: Path, original: Path) -> None:
    """A tokenizer left behind, or the original's index, which names files that are not there."""
    names = {path.name for path in folder.iterdir()}
    assert names >= {p.name for p in original.iterdir()} - {"model.safetensors"}
    assert "model.safetensors" not in names
    assert not any(name.endswith((".tmp", ".partial")) or name == "job.json" for name in names)
    kept = json.loads((original / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in kept} == kept
    index = json.loads((folder / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {
        "model-layers.safetensors",
        "model-rest.safetensors",
    }


def test_an_interrupted_run_is_continued(original: Path, tmp_path: Path) -> None:
    """Parts written twice, or half a part taken for a whole one."""
    target, job = tmp_path / "q", {"scheme": "nvfp4", "source": "abc"}
    packed = FORMATS["nvfp4"].quantize(torch.randn(32, 32))
    first = QuantizedFolderWriter(target, job=job)
    first.write("layer-0", matrices={"a": packed}, tensors={"b": torch.ones(3)})
    (first.partial / "model-layer-1.safetensors.tmp").write_bytes(b"half")
    assert not target.exists()
    second = QuantizedFolderWriter(target, job=job)
    assert second.parts == {"layer-0"}
    with pytest.raises(ModelLoadError, match="other settings"):
        QuantizedFolderWriter(target, job=job | {"scheme": "int4"})
    second.write("layer-1", matrices={"c": packed}, tensors={}, low_rank={"c": factors()})
    second.finish(original, FACTS, ignore=["lm_head"])
    assert not second.partial.exists()
    read = read_folder(target)
    assert read is not None
    assert set(read.groups) == {"a", "c"}
    with pytest.raises(ModelLoadError, match="exists already"):
        QuantizedFolderWriter(target, job=job)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(32, 2), torch.ones(2, 32)


def test_corrections_of_an_interrupted_finish_are_kept(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second finish that writes the file of corrections anew, from what the first had left."""
    packed = FORMATS["nvfp4"].quantize(torch.randn(32, 32))
    writer = QuantizedFolderWriter(tmp_path / "q", job={})
    for name in ("a", "b"):
        writer.write(name, matrices={name: packed}, tensors={}, low_rank={name: factors()})
    unlink = Path.unlink
    with monkeypatch.context() as patch:

        def power_cut(path: Path, **options: Any) -> None:
            if path.name == "lorc-b.safetensors":
                raise KeyboardInterrupt
            unlink(path, **options)

        patch.setattr(Path, "unlink", power_cut)
        with pytest.raises(KeyboardInterrupt):
            writer.finish(original, FACTS, ignore=[])
    facts = QuantizationFacts("nvfp4", lorc_rank=2)
    again = QuantizedFolderWriter(tmp_path / "q", job={}).finish(original, facts, ignore=[])
    read = read_folder(again)
    assert read is not None
    assert set(read.low_rank()) == {"a", "b"}


def test_nothing_quantised_is_no_quantised_model(original: Path, tmp_path: Path) -> None:
    """A folder that says it is quantised and is the original."""
    writer = QuantizedFolderWriter(tmp_path / "q", job={})
    writer.write("all", matrices={}, tensors={"a": torch.ones(1)})
    with pytest.raises(ModelLoadError, match="Nothing of"):
        writer.finish(original, FACTS, ignore=[])
    with pytest.raises(ValueError, match="no name for a part"):
        writer.write("../etc", matrices={}, tensors={})


def cut(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: cut(f, "model-layers.safetensors"), "model-layers.safetensors has .* cut short"),
        (lambda f: (f / "model-rest.safetensors").unlink(), "model-rest.safetensors is missing"),
        (lambda f: (f / INDEX_NAME).write_text("{"), f"unreadable {INDEX_NAME}"),
        (lambda f: (f / INDEX_NAME).unlink(), "model.safetensors is missing"),
        (
            lambda f: edit_config(f, lambda c: c["trimtab_quantization"].update(format=9)),
            "format 9; this trimtab reads 1",
        ),
        (
            lambda f: edit_config(f, lambda c: c["trimtab_quantization"].update(files={})),
            "lists no files",
        ),
        (
            lambda f: edit_config(f, lambda c: c["trimtab_quantization"].update(activations="i8")),
            "activations 'i8'",
        ),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"].update(quant_method="awq")),
            "quantised by 'awq'",
        ),
        (
            lambda f: edit_config(f, lambda c: c.pop("quantization_config")),
            "unreadable quantization_config",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder: Path, damage: Any, says: str) -> None:
    """A download that broke off is noticed in the middle of loading, or by odd answers."""
    damage(folder)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_model(str(folder), device="cpu", dtype="float32")
    assert "trimtab" in str(caught.value), "says what to do"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(PACKED), f"lacks {PACKED}"),
        (lambda t: t.update({PACKED: t[PACKED].float()}), "packed codes"),
        (lambda t: t.update({PACKED: t[PACKED][:, :8].contiguous()}), "scales"),
        (lambda t: t.update({PACKED: t[PACKED][:32], **scales(t, 32)}), "a weight \\(32, 32\\)"),
        (lambda t: t.update({"model.odd_proj.weight_packed": t[PACKED].clone()}), "odd_proj"),
    ],
)
def test_foreign_tensors_are_refused_by_name(folder: Path, change: Any, says: str) -> None:
    """Another model's layers in a folder of the right shape, or a file with a tensor lost."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        change(tensors)
        index = json.loads((folder / INDEX_NAME).read_text())
        rest = {n: f for n, f in index["weight_map"].items() if f != "model-layers.safetensors"}
        index["weight_map"] = rest | dict.fromkeys(tensors, "model-layers.safetensors")
        (folder / INDEX_NAME).write_text(json.dumps(index))

    edit_tensors(folder, edit)
    with pytest.raises(ModelLoadError, match=says):
        load_model(str(folder), device="cpu", dtype="float32")


def scales(tensors: dict[str, torch.Tensor], n_rows: int) -> dict[str, torch.Tensor]:
    name = PACKED.replace("_packed", "_scale")
    return {name: tensors[name][:n_rows].contiguous()}


def test_a_layer_that_the_model_has_not_is_refused(folder: Path) -> None:
    """Weights of another architecture that no layer asks for are left out in silence."""
    edit_config(folder, lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(ModelLoadError, match=r"layers\.1\..*no linear layer of a LlamaForCausalLM"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_a_plain_weight_that_is_missing_is_refused(folder: Path) -> None:
    """transformers fills it with random numbers."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        index["weight_map"].pop("model.norm.weight")
        (folder / INDEX_NAME).write_text(json.dumps(index))

    edit_tensors(folder, drop)
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights .*model\.norm\.weight"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_a_changed_byte_is_found_on_request(folder: Path) -> None:
    """Sizes are equal after a bit has flipped."""
    path = folder / "model-layers.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert read_folder(folder) is not None
    with pytest.raises(ModelLoadError, match="has changed since it was written"):
        read_folder(folder, verify=True)


def test_files_outside_the_folder_are_not_read(folder: Path) -> None:
    """An index from the net that names ../../secret."""

    def point_out(index_path: Path) -> None:
        index = json.loads(index_path.read_text())
        index["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
        index_path.write_text(json.dumps(index))

    point_out(folder / INDEX_NAME)
    with pytest.raises(ModelLoadError, match="no file of its folder"):
        read_folder(folder)

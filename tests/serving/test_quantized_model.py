"""The real model in four bits: written, loaded, served, steered by a vector of the original."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running_server import Served, running
from safetensors import safe_open
from torch import nn

from trimtab.kernels.formats import FORMATS
from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.loading import LoadedModel, load_model
from trimtab.steering.model.profile import fingerprint, profile_model, ref_without_weights
from trimtab.steering.model.quantized import QuantizationFacts, QuantizedFolderWriter
from trimtab.steering.store import Store
from trimtab.steering.vector import VectorArtifact

pytestmark = pytest.mark.slow

STEER = {"vectors": [{"id": "push", "scale": 1.0}]}


@pytest.fixture(scope="module")
def folder(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 rounded to NVFP4, layer by layer, without calibration."""
    assert smollm2.source_path is not None
    target = tmp_path_factory.mktemp("quantised") / "smollm2-nvfp4"
    writer = QuantizedFolderWriter(target, job={"scheme": "nvfp4"})
    modules = dict(smollm2.model.named_modules())
    with safe_open(smollm2.source_path / "model.safetensors", framework="pt") as file:
        parts: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118
            words = name.split(".")
            parts.setdefault(f"layer-{words[2]}" if "layers" in words else "rest", []).append(name)
        for part, names in parts.items():
            tensors = {name: file.get_tensor(name) for name in names}
            linear = {
                name.removesuffix(".weight")
                for name in names
                if type(modules[name.removesuffix(".weight")]) is nn.Linear
            }
            matrices = {n: FORMATS["nvfp4"].quantize(tensors.pop(f"{n}.weight")) for n in linear}
            writer.write(part, matrices=matrices, tensors=tensors)
    facts = QuantizationFacts("nvfp4", method="rtn", source={"id": "smollm2"})
    return writer.finish(smollm2.source_path, facts, ignore=["lm_head"])


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(
    loaded: LoadedModel, smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The quantised model, and a vector that says it is of the original."""
    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    row = torch.randn(profile.ref.hidden_size, generator=torch.Generator().manual_seed(0))
    row = row / row.norm() * profile.hidden_norms[14] * 0.6
    store = Store(tmp_path_factory.mktemp("store"))
    store.put_vector(
        VectorArtifact(
            id="push",
            model=profile.ref,
            layers=(14,),
            directions=row.unsqueeze(0),
            default_layers=(14,),
            method="caa",
        )
    )
    with running(TransformersEngine(lambda: loaded), store, settings=ServerSettings()) as served:
        yield served


def ask(served: Served, **more: Any) -> Any:
    messages = [{"role": "user", "content": "Describe a rainy day in one sentence."}]
    fields = {"model": "smollm2-nvfp4", "messages": messages, "max_tokens": 8, "temperature": 0}
    return served.openai.chat.completions.create(**fields | more)


def test_the_folder_is_the_same_model_in_a_quarter(
    folder: Path, loaded: LoadedModel, smollm2: LoadedModel
) -> None:
    """A fingerprint that counts the quantisation refuses every vector of the original."""
    assert fingerprint(loaded.model) == fingerprint(smollm2.model)
    ref = ref_without_weights(str(folder), model_id="q")
    assert (ref.fingerprint, ref.quantization) == (fingerprint(smollm2.model), "nvfp4 rtn")
    assert "210 matrices dequantised to float32 on a CPU" in loaded.reasons["weights"]
    layers = sum(f.stat().st_size for f in folder.glob("model-layer-*.safetensors"))
    n_weights = sum(p.numel() for p in smollm2.model.model.layers.parameters())
    assert layers * 8 / n_weights == pytest.approx(4.5, rel=0.03)


def test_weights_are_off_by_what_the_format_loses(
    loaded: LoadedModel, smollm2: LoadedModel
) -> None:
    """A layer in another's place, a scale off by two: the text may still read like text."""
    ids = smollm2.tokenizer("The library opens at nine, and people return", return_tensors="pt")
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.29.self_attn.v_proj"):
        ours = loaded.model.get_submodule(name).weight
        theirs = smollm2.model.get_submodule(name).weight
        assert float((ours - theirs).norm() / theirs.norm()) == pytest.approx(0.095, rel=0.06)
    with torch.no_grad():
        ours, theirs = (m.model(**ids).logits.log_softmax(-1) for m in (loaded, smollm2))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert 0.01 < float(divergence) < 0.4


def test_a_steered_stream_of_the_quantised_model(server: Served) -> None:
    """An answer that is not steered, or that hides on which weights its vector was measured."""
    plain = ask(server).choices[0].message.content
    body = {"steering": STEER}
    whole = ask(server, extra_body=body)
    chunks = list(ask(server, extra_body=body, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != plain
    (term,) = whole.steering["applied"]
    assert term["calibrated_on"] == "unquantised weights"
    assert term["served_on"] == "nvfp4 rtn"
    assert whole.steering["choices"][0]["steered_tokens"] > 8


def test_a_copy_that_broke_off_is_refused(folder: Path, tmp_path: Path) -> None:
    """Half a download that loads until the layer that is not there."""
    copy = tmp_path / "half"
    shutil.copytree(folder, copy, copy_function=os.link)
    shard = copy / "model-layer-7.safetensors"
    data = shard.read_bytes()
    shard.unlink()  # the link, not the file that other tests read
    shard.write_bytes(data[:-1000])
    with pytest.raises(ModelLoadError, match=r"layer-7.*cut short.*trimtab quantize"):
        load_model(str(copy), device="cpu", dtype="float32")

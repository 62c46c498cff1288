"""What every test shares: an isolated home, the real model loaded once, toys, and skip reasons.

Tiny models of many architectures are in `toys.py`: `from toys import TOYS` (`pythonpath` in
pyproject.toml puts this folder on the path).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# No test may reach a hub; read by huggingface_hub when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import browser
import pytest
import torch
import triton_interpreter

# Read by triton when it is imported, which transformers may do: its kernels run on the CPU then.
if triton_interpreter.is_known() and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from running_server import Served, running
from toys import llama
from transformers import PreTrainedModel

from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.classifier import ClassifierArtifact, SafeDose
from trimtab.steering.model.loading import LoadedModel, load_model
from trimtab.steering.model.profile import profile_model
from trimtab.steering.store import Store
from trimtab.training.classifiers.build import build_classifier
from trimtab.training.classifiers.examples import ExampleSet
from trimtab.training.classifiers.readers import bundled
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.pairs import PairSet, concept

NEEDS = {
    "gpu": (torch.cuda.is_available, "there is no CUDA device"),
    "vllm": (lambda: importlib.util.find_spec("vllm") is not None, "vLLM is not installed"),
    "triton": (
        lambda: torch.cuda.is_available() or triton_interpreter.is_known(),
        "there is neither a CUDA device nor a Triton whose interpreter's numbers we can mend",
    ),
    "extra": (lambda: "TRIMTAB_EXTRA" in os.environ, "it takes minutes; TRIMTAB_EXTRA=1 runs it"),
    "browser": (lambda: browser.executable() is not None, "no Chromium or Chrome is installed"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, (is_there, reason) in NEEDS.items():
        needy = [item for item in items if item.get_closest_marker(mark)]
        if needy and not is_there():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason=reason))
    runs_kernels = any(item.get_closest_marker("triton") for item in items)
    if runs_kernels and triton_interpreter.is_interpreted() and triton_interpreter.is_known():
        triton_interpreter.mend()


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tests out of the user's vectors. The cache stays shared: converting takes 20 s."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("trimtab-home")
        patch.setenv("TRIMTAB_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Give the next test torch's thread count back: results depend on it in the last bits."""
    n_threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests marked `triton` run their kernels: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real 135M model on the CPU in float32. Tests that use it are marked `slow`."""
    return load_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture
def toy_llama() -> PreTrainedModel:
    """A fresh seeded Llama: 2 layers, width 32, 4 heads, 2 key-value heads, vocabulary 128."""
    return llama()


@pytest.fixture(scope="session")
def real_store(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two of the real model's vectors and a classifier of few examples, to be copied."""
    store = Store(tmp_path_factory.mktemp("real"))
    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    host = SteeredModel(smollm2, profile)
    for name in ("optimistic", "formal"):
        some = PairSet(name, tuple(concept(name).build[:8]))
        store.put_vector(build_vector(host, some, id=name, is_calibrated=False))
    store.put_classifier(few_tones(host))
    return store


@pytest.fixture(scope="session")
def real_server(
    smollm2: LoadedModel, real_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server of the real model in float32, with a copy of `real_store`."""
    folder = tmp_path_factory.mktemp("served") / "store"
    shutil.copytree(real_store.folder, folder)
    engine = TransformersEngine(lambda: smollm2)
    settings = ServerSettings(served_model_name="smollm2")
    with running(engine, Store(folder), settings=settings) as served:
        yield served


def few_tones(host: SteeredModel) -> ClassifierArtifact:
    """The bundled tones, learned from fifteen questions' prompts; its doses are made up."""
    data = bundled("tone")
    made = build_classifier(
        host, ExampleSet("tones", data.examples[: 15 * 5]), id="tone", layers=(13, 16)
    )
    doses = tuple(
        SafeDose(target, (), picks_rival=False, is_reflection=False, dose=0.12)
        for target in (("empathetic",), ("concise", "empathetic"))
    )
    return replace(made, doses=doses)

"""GGUF control vectors: what we write others read, what they write we read, and no more."""

from __future__ import annotations

import copy
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.steering.artifact import ModelRef
from trimtab.steering.bank import Bank
from trimtab.steering.errors import ArtifactError
from trimtab.steering.gguf import from_gguf, to_gguf
from trimtab.steering.model.decoder import find_decoder_layers
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.plan import additive_plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.vector import VectorArtifact

# Only the environment of the development tools has it: it keeps numpy below 2.
repeng = pytest.importorskip("repeng", reason="repeng is not installed")

WIDTH = 24


def made(**changes: Any) -> VectorArtifact:
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    facts: dict[str, Any] = {
        "id": "warm",
        "model": ModelRef("smol", "f" * 64, "llama", WIDTH, 8),
        "layers": (0, 2, 5, 7),
        "directions": rows,
        "default_layers": (2, 5),
        "method": "caa",
        "normalize": True,
    }
    return VectorArtifact(**facts | changes)


def written(path: Path, tensors: dict[str, np.ndarray], *, hint: str | None = "llama") -> bytes:
    """Write a GGUF file by the reference writer, with whatever is wrong with it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def row(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def test_exported_file_opens_in_repeng(tmp_path: Path) -> None:
    """Shifted layers or a second scaling would steer another layer, or twice as hard, elsewhere."""
    vector = made()
    path = tmp_path / "v.gguf"
    path.write_bytes(to_gguf(vector))
    theirs = repeng.ControlVector.import_gguf(path)
    assert theirs.model_type == "llama"
    assert sorted(theirs.directions) == [2, 5]
    for layer, direction in theirs.directions.items():
        assert np.array_equal(direction, vector.row(layer).numpy())


def test_exported_file_has_llama_cpp_form(tmp_path: Path) -> None:
    """llama.cpp refuses a file whose tensors are not F32, 1-D, of one width and from layer 1 on."""
    path = tmp_path / "v.gguf"
    path.write_bytes(to_gguf(made(), layers=(2, 5, 7)))
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.layer_count"].contents() == 3
    assert [t.name for t in reader.tensors] == ["direction.2", "direction.5", "direction.7"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [WIDTH]


def test_own_file_comes_back_whole() -> None:
    """Without the extra keys a re-import would steer every layer and forget the norm."""
    vector = made()
    back = from_gguf(to_gguf(vector, layers=(2, 5, 7)), id="again", name="v.gguf")
    assert (back.id, back.method, back.model.fingerprint) == ("again", "gguf", None)
    assert (back.layers, back.default_layers, back.normalize) == ((2, 5, 7), (2, 5), True)
    assert torch.equal(back.directions, vector.directions[1:])


def test_repeng_file_is_read_with_its_numbers(tmp_path: Path) -> None:
    """An import that sorts layers apart from their rows gives each layer another's direction."""
    rng = np.random.default_rng(0)
    # repeng trains from the last layer down, so its files are in descending order.
    theirs = repeng.ControlVector(
        "llama", {n: rng.normal(size=16).astype(np.float32) for n in (7, 3, 1)}
    )
    theirs.export_gguf(tmp_path / "r.gguf")
    ours = from_gguf((tmp_path / "r.gguf").read_bytes(), id="r", name="r.gguf")
    assert (ours.layers, ours.default_layers, ours.normalize) == ((1, 3, 7), (1, 3, 7), False)
    assert ours.model == ModelRef("llama", None, "llama", 16, None)
    for layer in ours.layers:
        assert np.array_equal(ours.row(layer).numpy(), theirs.directions[layer])


def test_layer_0_is_refused_on_export_unless_unused() -> None:
    """A file with direction.0 is refused whole by llama.cpp; dropping it would weaken silently."""
    with pytest.raises(ArtifactError, match="layer 0"):
        to_gguf(made(default_layers=(0, 2)))
    with pytest.raises(ArtifactError, match="layer 0"):
        to_gguf(made(), layers=(0, 2))
    zero = torch.zeros(4, WIDTH)
    zero[1] = 1.0
    back = from_gguf(to_gguf(made(directions=zero, default_layers=(0, 2))), id="z", name="z")
    assert back.layers == (2,)  # a zero direction changes nothing by being left out
    with pytest.raises(ArtifactError, match="no layer"):
        to_gguf(made(directions=zero, default_layers=(0,)))


def test_export_refuses_a_layer_the_vector_lacks() -> None:
    """Skipping an asked-for layer would export something weaker than what was asked."""
    with pytest.raises(ArtifactError, match="layer 3"):
        to_gguf(made(), layers=(2, 3))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"direction.1": np.ones(4, np.float16)}, "F16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "one dimension"),
        ({"direction.1": row(1, 2), "direction.2": row(1, 2, 3)}, "unequal width"),
        ({"direction.0": row(1, 2)}, "direction.0"),
        ({"direction.-1": row(1, 2)}, "direction.-1"),
        ({"direction.01": row(1, 2)}, "direction.01"),
        ({"direction.99999": row(1, 2)}, "direction.99999"),
        ({"blk.1.weight": row(1, 2)}, "blk.1.weight"),
        ({"direction.1": row(1, float("nan"))}, "NaN"),
        ({"direction.1": row(1, float("inf"))}, "infinity"),
        ({}, "holds no"),
    ],
)
def test_unusable_tensors_are_named(
    tensors: dict[str, np.ndarray], named: str, tmp_path: Path
) -> None:
    """Each of these would steer wrongly, crash a request later or fail in llama.cpp."""
    data = written(tmp_path / "bad.gguf", tensors)
    with pytest.raises(ArtifactError, match=f"bad.gguf.*{named}"):
        from_gguf(data, id="bad", name="bad.gguf")


def test_missing_hint_and_other_architectures_are_named(tmp_path: Path) -> None:
    """A file that does not say its model, or is a whole model, must not become a vector."""
    data = written(tmp_path / "a.gguf", {"direction.1": row(1, 2)}, hint=None)
    with pytest.raises(ArtifactError, match="model_hint"):
        from_gguf(data, id="a", name="a.gguf")
    with pytest.raises(ArtifactError, match="not a control vector"):
        from_gguf(
            to_gguf(made()).replace(b"controlvector", b"controlvectox"), id="a", name="a.gguf"
        )
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        from_gguf(b"PK\x03\x04" + bytes(100), id="a", name="a.gguf")


def test_too_large_a_file_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model file of 20 GB must not be walked to find that it is not a vector."""
    monkeypatch.setattr("trimtab.steering.gguf.MAX_ARTIFACT_BYTES", 64)
    with pytest.raises(ArtifactError, match="at most 64"):
        from_gguf(to_gguf(made()), id="a", name="a.gguf")


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x")
TENSOR = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
        HEADER + struct.pack("<IIQ", 9, 4, 2**60),  # an array of 2**60 integers, none there
        HEADER + struct.pack("<IIQ", 9, 0, 4_000_000) + bytes(4_000_000),  # all of them there
        HEADER + struct.pack("<IIQ", 9, 9, 2**40) + struct.pack("<IQ", 9, 2**40) * 5000,
        HEADER + struct.pack("<IQ", 8, 2**62),  # a string of 2**62 bytes
        TENSOR + text("direction.1") + struct.pack("<IQIQ", 1, 2**61, 0, 0),
        TENSOR + text("direction.1") + struct.pack("<I", 2**32 - 1),
        TENSOR + text("direction.1") + struct.pack("<IQIQ", 1, 4, 0, 2**64 - 8) + bytes(64),
    ],
)
def test_hostile_sizes_end_at_once(data: bytes) -> None:
    """GGUFReader alone counts to 2**60 over an array that is not there, filling memory."""
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="not a whole GGUF file"):
        from_gguf(data, id="a", name="a.gguf")
    assert time.monotonic() - started < 5


def test_every_truncation_is_refused_or_harmless() -> None:
    """A download cut short must not become a vector with a shortened or missing direction."""
    vector = made()
    data = to_gguf(vector)
    for n in range(len(data)):
        try:
            back = from_gguf(data[:n], id="t", name="t")
        except ArtifactError:
            continue
        assert len(data) - n < 32  # only the last tensor's padding is gone
        assert torch.equal(back.directions, vector.directions[1:3])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_flipped_bytes_raise_only_artifact_errors(flips: list[tuple[int, int]]) -> None:
    """An IndexError or MemoryError out of an upload is a 500 and a crash of the import."""
    data = bytearray(to_gguf(made()))
    for at, value in flips:
        data[at % len(data)] = value
    try:
        back = from_gguf(bytes(data), id="f", name="f")
    except ArtifactError:
        return
    assert back.directions.isfinite().all()


@pytest.mark.slow
def test_same_tokens_as_repeng_on_the_real_model(smollm2: LoadedModel, tmp_path: Path) -> None:
    """A vector steering one layer early or late answers differently than in the tool it is from."""
    tokenizer, model = smollm2.tokenizer, smollm2.model
    layers = find_decoder_layers(model)
    width = model.config.hidden_size
    ids = tokenizer("The weather today is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    rng = np.random.default_rng(1)
    chosen = range(8, 22)
    directions = {}
    for layer in chosen:
        direction = rng.normal(size=width)
        size = 0.1 * float(hidden[layer + 1][0, 1:].norm(dim=-1).median())
        directions[layer] = (direction / np.linalg.norm(direction) * size).astype(np.float32)
    vector = repeng.ControlVector("llama", directions)
    vector.export_gguf(tmp_path / "r.gguf")
    ours = from_gguf((tmp_path / "r.gguf").read_bytes(), id="r", name="r.gguf")

    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0}
    mask = torch.ones_like(ids)
    unsteered = model.generate(ids, attention_mask=mask, **asked)
    theirs = repeng.ControlModel(copy.deepcopy(model), list(chosen))
    for coefficient in (1.0, -1.5):
        theirs.set_control(vector, coefficient)
        expected = theirs.generate(ids, attention_mask=mask, **asked)
        bank = Bank(n_layers=len(layers), hidden_size=width)
        lease = bank.acquire(additive_plan({n: ours.row(n) * coefficient for n in ours.layers}))
        assert lease is not None
        request = SteeredRequest(lease, n_prompt=ids.shape[1])
        cache, fed, tokens = None, ids, ids
        for _ in range(24):
            start = tokens.shape[1] - fed.shape[1]
            step = SteerStep(bank, [Span(fed.shape[1], start, request)])
            with torch.no_grad(), steered(layers, step):
                output = model(fed, past_key_values=cache, use_cache=True)
            cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, fed], dim=1)
        n = expected.shape[1]
        assert torch.equal(tokens[:, :n], expected)
        assert not torch.equal(expected, unsteered[:, :n])

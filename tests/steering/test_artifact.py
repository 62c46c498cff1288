"""Vector files: what is saved comes back, and no bytes raise anything but ArtifactError."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from trimtab.steering.artifact import ModelRef
from trimtab.steering.errors import ArtifactError
from trimtab.steering.vector import VectorArtifact, from_bytes, to_bytes

WIDTH = 8


def made(**changes: Any) -> VectorArtifact:
    generator = torch.Generator().manual_seed(0)
    facts: dict[str, Any] = {
        "id": "warm",
        "model": ModelRef("toy", "f" * 64, "llama", WIDTH, 6),
        "layers": (1, 2, 4),
        "directions": torch.randn(3, WIDTH, generator=generator),
        "default_layers": (2, 4),
        "method": "caa",
        "settings": {"batch": 4, "names": ["é", "b"]},
        "data": {"name": "pairs", "sha256": "0" * 64},
        "probe": torch.randn(3, 2, generator=generator),
        "probe_layer": 2,
        "normalize": True,
        "calibration": {"curve": [[0.5, 1.25], [1.0, 0.1]]},
        "description": "Warmer: ‘please’.",
        "created": "2026-01-01T00:00:00Z",
        "trimtab_version": "0.1.0",
    }
    return VectorArtifact(**facts | changes)


def rewritten(**header: Any) -> bytes:
    """Return a file whose header says something else."""
    data = to_bytes(made())
    (length,) = struct.unpack("<Q", data[:8])
    raw = json.loads(data[8 : 8 + length])
    own = json.loads(raw["__metadata__"]["trimtab"])
    raw["__metadata__"]["trimtab"] = json.dumps(own | header)
    text = json.dumps(raw).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def with_tensors(**tensors: torch.Tensor) -> bytes:
    data = to_bytes(made())
    (length,) = struct.unpack("<Q", data[:8])
    return save(tensors, metadata=json.loads(data[8 : 8 + length])["__metadata__"])


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        from_bytes(data, name="v.safetensors")
    for word in words:
        assert word in caught.value.message


def same(a: VectorArtifact, b: VectorArtifact) -> bool:
    probes = (a.probe is None) == (b.probe is None)
    if a.probe is not None and b.probe is not None:
        probes = torch.equal(a.probe, b.probe)
    return probes and torch.equal(a.directions, b.directions) and a.card() == b.card()


@pytest.mark.parametrize("changes", [{}, {"probe": None, "probe_layer": None}])
def test_saved_then_loaded_equals_original(changes: dict) -> None:
    """A field forgotten on either side is lost from every vector that is built from then on."""
    vector = made(**changes)
    back = from_bytes(to_bytes(vector), name="v")
    assert same(vector, back)
    assert to_bytes(back) == to_bytes(vector)


def test_every_truncation_is_refused() -> None:
    """A half-written file that loads steers by zeros or by whatever lies behind it."""
    data = to_bytes(made())
    for n in range(len(data)):
        refused(data[:n])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_raise_only_artifact_errors(flips: list[tuple[int, int]]) -> None:
    """A KeyError out of a damaged file stops the server from starting for one bad vector."""
    data = bytearray(to_bytes(made()))
    for at, value in flips:
        data[at % len(data)] = value
    try:
        back = from_bytes(bytes(data), name="v")
    except ArtifactError:
        return
    assert back.directions.isfinite().all()
    assert len(back.digest) == 64
    to_bytes(back)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Uploads are anything; the reader may only ever say no."""
    refused(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        pickle.dumps({"directions": [1.0]}),
        b"PK\x03\x04" + bytes(200),
        b"GGUF" + bytes(200),
    ],
)
def test_foreign_and_hostile_files_are_refused(data: bytes) -> None:
    """A pickle, a zip or a length of 2**63 must be recognised, not opened or allocated."""
    refused(data, "v.safetensors")


def test_a_huge_tensor_in_a_small_file_is_refused() -> None:
    """A header that claims 4 TB of tensor must not be believed before the bytes are there."""
    data = to_bytes(made(probe=None, probe_layer=None))
    (length,) = struct.unpack("<Q", data[:8])
    raw = json.loads(data[8 : 8 + length])
    raw["directions"] |= {"shape": [3, 2**40], "data_offsets": [0, 3 * 2**42]}
    text = json.dumps(raw).encode()
    refused(struct.pack("<Q", len(text)) + text + data[8 + length :], "safetensors")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"kind": "classifier"}, "classifier"),
        ({"hook": "mlp_output"}, "mlp_output"),
        ({"layers": [1, 2, 3, 4]}, "expected float32 (4, 8)"),
        ({"layers": [4, 2, 1]}, "ascending"),
        ({"layers": [-1, 2, 4]}, "ascending"),
        ({"layers": [1, 2, 6]}, "past the model's 6"),
        ({"layers": []}, "no layers"),
        ({"layers": None}, "incomplete"),
        ({"layers": ["x", 1, 2]}, "incomplete"),
        ({"default_layers": []}, "default layers"),
        ({"default_layers": [3]}, "default layers"),
        ({"probe_layer": 3}, "probe layer"),
        ({"model": {"id": "x"}}, "incomplete"),
        ({"model": 3}, "incomplete"),
        ({"settings": 3}, "incomplete"),
        ({"calibration": {"x": float("inf")}}, "header"),
        ({"description": "\ud800"}, "header"),
    ],
)
def test_inconsistent_headers_are_named(header: dict, word: str) -> None:
    """A file that loads but does not fit itself fails inside a running request."""
    refused(rewritten(**header), word)


def test_a_number_past_float_in_a_header_is_refused() -> None:
    """1e400 reads as infinity, and the vector could then never be saved or listed as JSON."""
    data = rewritten(calibration={"x": 123456789.5}).replace(b"123456789.5", b"1.2345e+400")
    assert b"e+400" in data
    refused(data, "header")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"probe": torch.zeros(3, 2)}, "directions"),
        ({"directions": torch.zeros(3, WIDTH).half()}, "float16"),
        ({"directions": torch.zeros(3, WIDTH + 1)}, "expected float32"),
        ({"directions": torch.full((3, WIDTH), float("nan"))}, "NaN"),
        ({"directions": torch.zeros(3, WIDTH), "probe": torch.zeros(3, 2).bfloat16()}, "probe"),
        ({"directions": torch.zeros(3, WIDTH), "probe": torch.zeros(3, 3)}, "probe"),
        ({"directions": torch.zeros(3, WIDTH), "probe": torch.full((3, 2), torch.inf)}, "probe"),
    ],
)
def test_unfit_tensors_are_named(tensors: dict, word: str) -> None:
    """A bfloat16 probe loads, and then fails in the digest of the first request that uses it."""
    refused(with_tensors(**tensors), word)


def test_building_an_invalid_vector_is_refused() -> None:
    """A builder's mistake must show when the vector is made, not when a user asks for it."""
    with pytest.raises(ArtifactError, match="NaN"):
        made(directions=torch.full((3, WIDTH), float("nan")))


def test_the_digest_is_of_what_steers() -> None:
    """Equal digests are served from one cached page; a digest of the name shares nothing."""
    vector = made()
    assert vector.renamed("other").digest == vector.digest
    assert replace(vector, description="x", calibration=None).digest == vector.digest
    for changes in (
        {"directions": vector.directions + 1e-6},
        {"layers": (0, 2, 4)},
        {"normalize": False},
        {"default_layers": (2,)},
        {"probe": made().probe + 1e-6},
        {"probe_layer": 4},
    ):
        assert replace(vector, **changes).digest != vector.digest


def test_a_card_is_plain_json() -> None:
    """A tensor left in the card breaks the listing of all vectors."""
    card = json.loads(json.dumps(made().card(), allow_nan=False))
    assert (card["id"], card["has_probe"], len(card["norms"])) == ("warm", True, 3)


def test_the_quantisation_it_was_made_on_is_kept() -> None:
    """A field that is dropped, or one that makes older files unreadable or changes newer ones."""
    plain = made()
    assert from_bytes(to_bytes(plain), name="v").model.quantization is None
    assert b"quantization" not in to_bytes(plain)
    quantised = made(model=replace(plain.model, quantization="w4a8 gptq"))
    again = from_bytes(to_bytes(quantised), name="v")
    assert again.model == quantised.model
    assert again.card()["model"]["quantization"] == "w4a8 gptq"
    assert again.digest == plain.digest

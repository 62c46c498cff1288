"""What every artifact's file has: safetensors with JSON in its header, no pickle on any path."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from trimtab.steering.errors import ArtifactError

FORMAT_VERSION = 1
HOOK_POINT = "decoder_layer_output"
MAX_ARTIFACT_BYTES = 256 * 2**20
_MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ModelRef:
    """Which model an artifact belongs to.

    Attributes:
        id: name the model was loaded under.
        fingerprint: hash of its config and weight shapes; None for foreign files (GGUF).
        model_type: the config's `model_type`, such as `llama`.
        hidden_size: width of the residual stream.
        n_layers: number of decoder layers; None when the file does not say.
        quantization: how its weights were quantised, such as `nvfp4 gptq`; None if they were not.
            It makes no other model: the fingerprint is the original's.
    """

    id: str
    fingerprint: str | None
    model_type: str
    hidden_size: int
    n_layers: int | None
    quantization: str | None = None

    def measured_elsewhere(self, served: ModelRef) -> str | None:
        """Return what an artifact's model ran on, if that is known and not what is served."""
        if self.fingerprint is None or self.quantization == served.quantization:
            return None
        return self.weights

    @property
    def weights(self) -> str:
        """What it ran on, for a person: the quantisation, or that there was none."""
        return self.quantization or "unquantised weights"

    def facts(self) -> dict[str, Any]:
        """Return the fields as artifacts store them, plain JSON."""
        facts = asdict(self)
        # So that an artifact of unquantised weights is the file it always was.
        if self.quantization is None:
            del facts["quantization"]
        return facts


def layers_problem(
    layers: tuple[int, ...], default_layers: tuple[int, ...], model: ModelRef
) -> str | None:
    """Return what is wrong with an artifact's layers, or None."""
    if not layers:
        return "it has no layers"
    if list(layers) != sorted(set(layers)) or layers[0] < 0:
        return f"its layers {layers} are not ascending and distinct"
    if model.n_layers is not None and layers[-1] >= model.n_layers:
        return f"layer {layers[-1]} is past the model's {model.n_layers} layers"
    if not default_layers or not set(default_layers) <= set(layers):
        return f"its default layers {default_layers} are not among its layers"
    return None


def packed(kind: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """Return an artifact's file.

    Args:
        kind: `vector` or `classifier`.
        facts: its fields; those that are tensors are left out.
        tensors: its tensors by name.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "hook": HOOK_POINT,
        **{key: value for key, value in facts.items() if key not in tensors},
    }
    return save_tensors(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"trimtab": json.dumps(header, allow_nan=False)},
    )


def unpacked(
    kind: str, data: bytes, *, needed: tuple[str, ...], name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an artifact's file: its header and its tensors.

    Args:
        kind: what it must be.
        data: the whole file.
        needed: tensors it must have.
        name: what to call it in errors.

    Raises:
        ArtifactError: not safetensors, cut short, not ours, of another kind or a newer format.
    """
    if len(data) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"{name} has {len(data)} bytes; at most {MAX_ARTIFACT_BYTES} are allowed."
        )
    header = _header(data, name=name)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{name} is not a whole safetensors file: {error}.") from None
    if header.get("kind") != kind or header.get("hook") != HOOK_POINT:
        raise ArtifactError(
            f"{name} is a {header.get('kind')!r} at {header.get('hook')!r}; "
            f"expected a {kind!r} at {HOOK_POINT!r}."
        )
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{name} has format version {version!r}; this trimtab reads {FORMAT_VERSION}."
        )
    for tensor in needed:
        if tensor not in tensors:
            raise ArtifactError(f"{name} has no tensor {tensor!r}.")
    return header, tensors


@contextmanager
def complete_header(name: str) -> Iterator[None]:
    """Report a field that is missing, or of another type, while a header is read.

    Raises:
        ArtifactError: naming the file and the field.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{name} has an incomplete header: {error!r}.") from None


def _header(data: bytes, *, name: str) -> dict[str, Any]:
    if len(data) < 8:
        raise ArtifactError(f"{name} has {len(data)} bytes: not a safetensors file.")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ArtifactError(f"{name} is not a whole safetensors file: its header is cut short.")
    try:
        raw = json.loads(data[8 : 8 + length])
        text = raw["__metadata__"]["trimtab"]
        header = json.loads(text, parse_constant=_finite, parse_float=_finite)
        # A lone surrogate would pass here and break every answer that lists this vector.
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactError(
            f"{name} has no trimtab header. A GGUF control vector is read by "
            "`trimtab vectors import`."
        ) from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{name} has a trimtab header that is not an object.")
    return header


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} in a header; finite numbers only")
    return value

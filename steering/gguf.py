"""Control vectors in and out: the GGUF files of llama.cpp, repeng and their descendants.

A control vector is a GGUF file of architecture `controlvector` with one tensor `direction.<N>`
(float32, one-dimensional) a layer. N is our 0-based layer: repeng's layer ids index the model's
list of decoder layers and are added to a layer's output, and llama.cpp adds `direction.N` right
after the last residual sum of block N, also counted from 0. llama.cpp has no place for layer 0
and refuses the whole file for it, so we neither write nor read it.

Source: llama.cpp `common_control_vector_load_one` and `llama_adapter_cvec::apply`; repeng 0.4.0
`ControlVector.export_gguf` and `ControlModel`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from trimtab.steering.artifact import MAX_ARTIFACT_BYTES, ModelRef
from trimtab.steering.errors import ArtifactError, listed
from trimtab.steering.vector import VectorArtifact

ARCHITECTURE = "controlvector"
# A control vector of 200 layers needs about 1,500 pieces; a hostile array would need millions.
_MAX_PIECES = 50_000
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def to_gguf(vector: VectorArtifact, *, layers: tuple[int, ...] | None = None) -> bytes:
    """Return a vector as a GGUF control vector file's bytes.

    Other programs apply every direction in the file, so only the default layers are written: at
    strength 1.0 they then do what scale 1.0 does here. The calibrated strength is in the numbers.
    Default layers and norm preservation are also kept under `trimtab.*` keys, which others
    ignore. Left out: the directions of other layers, an all-zero direction at layer 0, the probe,
    the calibration curve and the model's fingerprint.

    Args:
        vector: what to write.
        layers: layers to write in place of the default ones.

    Raises:
        ArtifactError: a layer the vector lacks, a non-zero layer 0, or no model type to name.
    """
    wanted = vector.default_layers if layers is None else tuple(sorted(set(layers)))
    unknown = set(wanted) - set(vector.layers)
    if unknown:
        raise ArtifactError(
            f"Vector {vector.id!r} has no direction for layer {min(unknown)}; it has "
            f"{', '.join(map(str, vector.layers))}."
        )
    if 0 in wanted and vector.row(0).any():
        raise ArtifactError(
            f"Vector {vector.id!r} steers layer 0, which a GGUF control vector cannot hold: "
            "llama.cpp refuses a file with `direction.0`. Name other layers to export."
        )
    wanted = tuple(layer for layer in wanted if layer > 0)
    if not wanted:
        raise ArtifactError(f"Vector {vector.id!r} leaves no layer to export.")
    if not vector.model.model_type:
        raise ArtifactError(f"Vector {vector.id!r} does not say which model type it is for.")
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        path = Path(folder) / "vector.gguf"
        writer = GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model.model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(wanted))
        writer.add_string("trimtab.strength", "baked in")
        writer.add_string("trimtab.model_id", vector.model.id)
        writer.add_string("trimtab.method", vector.method)
        writer.add_bool("trimtab.normalize", vector.normalize)
        used = [layer for layer in vector.default_layers if layer in wanted]
        writer.add_array("trimtab.default_layers", used or list(wanted))
        for layer in wanted:
            writer.add_tensor(f"direction.{layer}", vector.row(layer).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def from_gguf(data: bytes, *, id: str, name: str) -> VectorArtifact:
    """Read a GGUF control vector.

    Foreign files apply everywhere they have a direction, so all layers are default layers; our
    own restore the default layers and norm preservation they were written with. A GGUF file has
    no fingerprint: width, layers and model type are all that can be compared with a model.

    Args:
        data: the whole file.
        id: name of the new vector.
        name: what to call the file in errors.

    Raises:
        ArtifactError: not a whole GGUF control vector, or one that no model could take.
    """
    if len(data) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"{name} has {len(data)} bytes; at most {MAX_ARTIFACT_BYTES} are allowed."
        )
    if data[:4] != b"GGUF":
        raise ArtifactError(f"{name} is not a GGUF file.")
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        path = Path(folder) / "vector.gguf"
        path.write_bytes(data)
        try:
            with np.errstate(all="raise"):
                reader = _BoundedReader(path)
                fields = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the reader fails in as many ways as bytes can be wrong
            raise ArtifactError(
                f"{name} is not a whole GGUF file: {type(error).__name__}: {error}"[:300] + "."
            ) from None
        return _vector(fields, _directions(reader, name=name), id=id, name=name)


class _BoundedReader(GGUFReader):
    """A reader that stays inside the file.

    GGUFReader takes an empty slice past the end for a value of no bytes, so that an array which
    claims 2**60 entries keeps it busy for ever, and it makes an object of every entry.
    """

    _n_pieces = 0

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        size = int(np.dtype(dtype).itemsize) * int(count)
        if int(offset) + size > len(self.data):
            raise ValueError("it is cut short")
        self._n_pieces += 1
        if self._n_pieces > _MAX_PIECES:
            raise ValueError("its header is too large for a control vector")
        return super()._get(int(offset), dtype, count, override_order)


def _directions(reader: GGUFReader, *, name: str) -> dict[int, np.ndarray]:
    rows: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        shown = tensor.name[:80]
        found = _DIRECTION.fullmatch(tensor.name)
        if found is None:
            raise ArtifactError(
                f"{name} holds a tensor {shown!r}; a control vector has only `direction.<layer>`."
            )
        layer = int(found[1])
        if layer == 0:
            raise ArtifactError(
                f"{name} holds `direction.0`; the layers of a control vector start at 1, and "
                "llama.cpp refuses such a file too."
            )
        if tensor.tensor_type != GGMLQuantizationType.F32:
            raise ArtifactError(f"{name}: {shown} is {tensor.tensor_type.name}, expected F32.")
        if len(tensor.shape) != 1 or tensor.n_elements == 0:
            raise ArtifactError(
                f"{name}: {shown} has shape {tensor.shape.tolist()}, expected one dimension."
            )
        # A copy, for the file under the memory map goes away; in this machine's byte order.
        rows[layer] = np.array(tensor.data, dtype=np.float32)
        if not np.isfinite(rows[layer]).all():
            raise ArtifactError(f"{name}: {shown} holds NaN or infinity.")
    if not rows:
        raise ArtifactError(f"{name} holds no `direction.<layer>` tensor.")
    widths = {len(row) for row in rows.values()}
    if len(widths) > 1:
        raise ArtifactError(
            f"{name} holds directions of unequal width: {listed(map(str, widths))}."
        )
    return dict(sorted(rows.items()))


def _vector(
    fields: dict[str, Any], rows: dict[int, np.ndarray], *, id: str, name: str
) -> VectorArtifact:
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ArtifactError(
            f"{name} is a GGUF file of {architecture!r}, not a control vector ({ARCHITECTURE!r})."
        )
    model_type = fields.get(f"{ARCHITECTURE}.model_hint")
    if not isinstance(model_type, str) or not 0 < len(model_type) <= 100:
        raise ArtifactError(
            f"{name} does not say which model it is for: `{ARCHITECTURE}.model_hint` is missing "
            "or no name."
        )
    layers = tuple(rows)
    default = fields.get("trimtab.default_layers", list(layers))
    if not isinstance(default, list) or not default or not set(default) <= set(layers):
        raise ArtifactError(f"{name}: `trimtab.default_layers` is not a list of its layers.")
    normalize = fields.get("trimtab.normalize", False)
    if not isinstance(normalize, bool):
        raise ArtifactError(f"{name}: `trimtab.normalize` is {normalize!r}, expected a bool.")
    source = {
        key: str(value)[:200]
        for key in ("trimtab.model_id", "trimtab.method", "trimtab.strength")
        if (value := fields.get(key)) is not None
    }
    return VectorArtifact(
        id=id,
        model=ModelRef(
            id=source.get("trimtab.model_id", model_type),
            fingerprint=None,
            model_type=model_type,
            hidden_size=len(rows[layers[0]]),
            n_layers=None,
        ),
        layers=layers,
        directions=torch.from_numpy(np.stack(list(rows.values()))),
        default_layers=tuple(layer for layer in layers if layer in default),
        method="gguf",
        settings={"file": name, **source},
        normalize=normalize,
        description=f"Imported from the GGUF control vector {name}.",
    )

"""How alike vectors are: the cosine of their rows, a number for every two."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.steering.errors import SpecError
from trimtab.steering.vector import VectorArtifact

MAX_VECTORS = 256
"""Most vectors to compare at once; the work grows with the square of their number."""

Matrix = list[list[float | None]]


def similarities(vectors: Sequence[VectorArtifact], *, layer: int | None = None) -> Matrix:
    """Return the cosine similarity of every two vectors, -1 to 1, six decimals.

    Two vectors are compared where they steer: it is the mean, over the layers that either of them
    uses by default, of the cosine of their two rows there. Directions of different layers lie in
    different spaces and are never compared with each other. How long rows are does not count.

    Args:
        vectors: at most `MAX_VECTORS`, each id once.
        layer: compare the rows at this layer alone, 0-based.

    Returns:
        A row a vector, in their order; symmetric, 1 on the diagonal. None where two vectors have
        no layer to compare at: none of the above at which both have a row that is not zero, or
        they belong to models that are known to differ.

    Raises:
        SpecError: too many vectors, one named twice, or a layer at which none has a row.
    """
    _check(vectors, layer)
    n = len(vectors)
    total = torch.zeros(n, n, dtype=torch.float64)
    counts = torch.zeros(n, n, dtype=torch.float64)
    layers = {at for vector in vectors for at in vector.default_layers}
    for at in sorted(layers) if layer is None else [layer]:
        counts_here = torch.tensor([layer == at or at in v.default_layers for v in vectors])
        for members in _of_one_width(vectors):
            units = torch.stack([_unit(vectors[i], at) for i in members])
            is_there = units.any(dim=1)
            asks = counts_here[members]
            pairs = is_there & is_there.unsqueeze(1) & (asks | asks.unsqueeze(1))
            block = torch.meshgrid(*[torch.tensor(members)] * 2, indexing="ij")
            total[block] += torch.where(pairs, units @ units.T, 0.0)
            counts[block] += pairs
    # A product's two halves may differ in the last bit.
    means = ((total + total.T) / (2 * counts.clamp_min(1))).clamp(-1.0, 1.0)
    is_known = (counts > 0) & _of_one_model(vectors)
    return [
        [
            round(value, 6) + 0.0 if known else None  # + 0.0: there is no -0
            for value, known in zip(row, knows, strict=True)
        ]
        for row, knows in zip(means.tolist(), is_known.tolist(), strict=True)
    ]


def _check(vectors: Sequence[VectorArtifact], layer: int | None) -> None:
    if len(vectors) > MAX_VECTORS:
        raise SpecError(
            f"There are {len(vectors)} vectors to compare; at most {MAX_VECTORS} are compared at "
            "once. Name those that matter (over HTTP: ids=a,b,c).",
            param="ids",
        )
    ids = [vector.id for vector in vectors]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"Vector {twice!r} is named twice; name each once.", param="ids")
    known = sorted({at for vector in vectors for at in vector.layers})
    if layer is not None and known and layer not in known:
        raise SpecError(
            f"No vector has a row at layer {layer}; they have rows from {known[0]} to {known[-1]}.",
            param="layer",
        )


def _unit(vector: VectorArtifact, layer: int) -> torch.Tensor:
    """Return a row at length one, `[hidden_size]`, float64; zeros where there is none."""
    if layer not in vector.layers:
        return torch.zeros(vector.model.hidden_size, dtype=torch.float64)
    row = vector.row(layer).double()
    length = row.norm()
    return row / length if length > 0 else row


def _of_one_width(vectors: Sequence[VectorArtifact]) -> list[list[int]]:
    """Return the vectors' numbers, grouped by the width of their rows."""
    groups: dict[int, list[int]] = {}
    for i, vector in enumerate(vectors):
        groups.setdefault(vector.model.hidden_size, []).append(i)
    return list(groups.values())


def _of_one_model(vectors: Sequence[VectorArtifact]) -> torch.Tensor:
    """Return whether two vectors may be of one model, `[n, n]`; a GGUF file does not say."""
    prints = [vector.model.fingerprint for vector in vectors]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(prints))}
    codes = torch.tensor([-1 if name is None else numbers[name] for name in prints])
    return (codes == codes.unsqueeze(1)) | (codes == -1) | (codes == -1).unsqueeze(1)

"""Cosines between vectors: their laws, and where they are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from serving_fakes import model_ref

from trimtab.steering.errors import SpecError
from trimtab.steering.similarity import MAX_VECTORS, similarities
from trimtab.steering.vector import VectorArtifact

WIDTH, LAYERS = 16, 4


def vector(
    name: str,
    rows: torch.Tensor | None = None,
    *,
    seed: int = 0,
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    default: tuple[int, ...] = (2,),
    **ref: object,
) -> VectorArtifact:
    """A vector of given rows, or of random ones."""
    if rows is None:
        rows = torch.randn(len(layers), WIDTH, generator=torch.Generator().manual_seed(seed))
    sizes = {"hidden_size": rows.shape[1], "n_layers": LAYERS}
    return VectorArtifact(
        id=name,
        model=model_ref(**sizes | ref),
        layers=layers,
        directions=rows,
        default_layers=default,
        method="mean_difference",
    )


def cosine(a: VectorArtifact, b: VectorArtifact, *layers: int) -> float:
    """The mean cosine at some layers, by torch's own function."""
    found = [torch.cosine_similarity(a.row(n).double(), b.row(n).double(), dim=0) for n in layers]
    return float(torch.stack(found).mean())


def test_symmetric_and_one_on_the_diagonal():
    """Catches a matrix whose halves disagree in a digit, or rows that are not of length one."""
    some = [vector(str(i), seed=i, default=(i % LAYERS,)) for i in range(12)]
    for layer in (None, 3):
        matrix = similarities(some, layer=layer)
        assert [matrix[i][i] for i in range(12)] == [1.0] * 12
        assert matrix == [list(column) for column in zip(*matrix, strict=True)]
        assert all(abs(x) < 1 for i, row in enumerate(matrix) for x in row[:i])


def test_a_negative_is_minus_one_and_length_does_not_count():
    """Catches a dot product given as a cosine."""
    a = vector("a")
    b = replace(a, id="b", directions=-7 * a.directions)
    c = replace(a, id="c", directions=1e-20 * a.directions)
    assert similarities([a, b, c]) == [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]


def test_orthogonal_rows_are_zero_and_never_minus_zero():
    """Catches a "-0.0" on the wire."""
    eye = torch.eye(WIDTH)
    a = vector("a", eye[[0] * LAYERS])
    b = vector("b", -eye[[1] * LAYERS])
    assert str(similarities([a, b])[0][1]) == "0.0"


def test_layer_chooses_the_rows():
    """Catches a layer taken for a row's place, which differ in a vector with gaps."""
    a = vector("a", seed=1, layers=(1, 3), default=(1,))
    b = vector("b", seed=2)
    for layer in (1, 3):
        expected = pytest.approx(cosine(a, b, layer), abs=1e-6)
        assert similarities([a, b], layer=layer)[0][1] == expected
    assert cosine(a, b, 1) != pytest.approx(cosine(a, b, 3), abs=1e-2)


def test_by_default_vectors_are_compared_where_either_steers():
    """Catches another layer, one side's layers alone, or a layer both use counted twice."""
    a = vector("a", seed=1, default=(0, 1))
    b = vector("b", seed=2, default=(1, 3))
    c = vector("c", seed=3, default=(2,))
    matrix = similarities([a, b, c])
    assert matrix[0][1] == pytest.approx(cosine(a, b, 0, 1, 3), abs=1e-6)
    assert matrix[0][2] == pytest.approx(cosine(a, c, 0, 1, 2), abs=1e-6)
    assert matrix[1][2] == pytest.approx(cosine(b, c, 1, 2, 3), abs=1e-6)


def test_layers_that_one_of_two_lacks_are_left_out():
    """Catches a missing row counted as a cosine of 0, which pulls the mean there."""
    a = vector("a", seed=1, layers=(0, 1), default=(0, 1))
    b = vector("b", seed=2, layers=(1, 2), default=(2,))
    assert similarities([a, b])[0][1] == pytest.approx(cosine(a, b, 1), abs=1e-6)


def test_nothing_in_common_is_none():
    """Catches a 0, which says that two directions are unrelated, where nothing is known."""
    a = vector("a", seed=1, layers=(0, 1), default=(0,))
    b = vector("b", seed=2, layers=(2, 3), default=(2,))
    assert similarities([a, b]) == [[1, None], [None, 1]]
    assert similarities([a, b], layer=1) == [[1, None], [None, None]]
    silent = vector("silent", torch.zeros(LAYERS, WIDTH))
    assert similarities([a, silent]) == [[1, None], [None, None]]


def test_other_models_vectors_are_not_compared():
    """Catches a cosine between spaces that have nothing to do with each other, and a crash where
    their widths differ. A GGUF file does not say what it was built for."""
    a = vector("a", seed=1)
    wide = vector("wide", torch.ones(LAYERS, 24))
    foreign = vector("foreign", seed=2, fingerprint="0" * 64)
    gguf = vector("gguf", seed=3, fingerprint=None)
    matrix = similarities([wide, a, foreign, gguf])
    assert [[x is not None for x in row] for row in matrix] == [
        [True, False, False, False],
        [False, True, False, True],
        [False, False, True, True],
        [False, True, True, True],
    ]
    assert matrix[1][3] == pytest.approx(cosine(a, gguf, 2), abs=1e-6)


def test_what_cannot_be_compared_is_refused():
    """Catches work without bound, one vector twice, and a matrix of nothing but nulls."""
    many = [vector(str(i)) for i in range(MAX_VECTORS + 1)]
    with pytest.raises(SpecError, match=r"257 .* at most 256") as caught:
        similarities(many)
    assert caught.value.param == "ids"
    assert len(similarities(many[:-1])) == MAX_VECTORS
    with pytest.raises(SpecError, match="'0' is named twice") as caught:
        similarities([many[0], many[1], many[0]])
    assert caught.value.param == "ids"
    with pytest.raises(SpecError, match="from 0 to 3") as caught:
        similarities(many[:2], layer=4)
    assert caught.value.param == "layer"


def test_an_empty_store_has_an_empty_matrix():
    """Catches a crash before the first vector is built."""
    assert similarities([]) == similarities([], layer=3) == []

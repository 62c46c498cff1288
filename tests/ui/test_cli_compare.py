"""`trimtab vectors compare`: the matrix as a table, whole and readable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cli_program import vector

from trimtab.steering.similarity import similarities
from trimtab.ui.commands.vector_compare import similarity_tables


@pytest.fixture
def three(store):
    """Two opposites, and one that shares half of its rows with the first."""
    warm = vector("warm")
    half = torch.ones(2, 8)
    half[1, :4] = 0
    for one in (
        warm,
        replace(warm, id="cold", directions=-3 * warm.directions),
        replace(warm, id="mild", directions=half),
    ):
        store.put_vector(one)
    return store


def test_all_vectors_are_compared(trimtab, three):
    """Catches a column under another vector's number, or a sign lost in the table."""
    done = trimtab("vectors", "compare")
    assert done.code == 0, done.err
    head, _, *lines = done.out.splitlines()
    assert head == "Cosine over the layers they steer by default"
    assert [line.split() for line in lines] == [
        ["vector", "1", "2", "3"],
        ["1", "cold", "+1.00", "-1.00", "-1.00"],
        ["2", "mild", "-1.00", "+1.00", "+1.00"],
        ["3", "warm", "-1.00", "+1.00", "+1.00"],
    ]
    assert done.err.startswith("Next: trimtab vectors")


def test_names_and_layer_choose(trimtab, three):
    """Catches names that are ignored, and a layer that is."""
    shown = trimtab("vectors", "compare", "warm", "mild", "--layer", "2", "--json").json
    cosine = round(0.5**0.5, 6)
    assert shown == {"ids": ["warm", "mild"], "layer": 2, "matrix": [[1, cosine], [cosine, 1]]}
    some = [three.vector(name) for name in ("mild", "warm")]
    plain = trimtab("vectors", "compare", "mild", "warm", "--json").json
    assert plain == {"ids": ["mild", "warm"], "layer": None, "matrix": similarities(some)}
    table = trimtab("vectors", "compare", "warm", "mild", "--layer", "2").out
    assert table.startswith("Cosine at layer 2\n")
    assert "+0.71" in table


def test_a_wide_matrix_is_broken_into_columns(home):
    """Catches lines that a terminal folds, and a column that is lost where the matrix is broken."""
    n = 23
    ids = [f"vector-{i}" for i in range(n)]
    rows = [[(i * n + j) % 200 / 100 - 1 for j in range(n)] for i in range(n)]
    tables = similarity_tables(ids, rows)
    lines = [text.splitlines() for text in tables]
    assert len(tables) > 1
    assert all(len(line) <= 80 for text in lines for line in text)
    assert [x for text in lines for x in text[0].split()[1:]] == [str(j + 1) for j in range(n)]
    for i in range(n):
        cells = [float(x) for text in lines for x in text[1 + i].split()[2:]]
        assert cells == pytest.approx(rows[i], abs=1e-9)


def test_nothing_to_compare(trimtab, store):
    """Catches an empty page, and a damaged file that is left out in silence."""
    done = trimtab("vectors", "compare")
    assert (done.code, done.out) == (0, "")
    assert "trimtab vectors build" in done.err
    store.put_vector(vector())
    (store.folder / "vectors" / "torn.safetensors").write_bytes(b"torn")
    done = trimtab("vectors", "compare")
    assert done.code == 0
    assert "torn.safetensors" in done.err

"""The layout in memory and the choice of kernels: what needs no Triton."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from trimtab.kernels.formats import format_named
from trimtab.kernels.matmul import dispatch
from trimtab.kernels.matmul.fragments import COLUMNS, Fragments, column_order, scheme_of, takes

CPU = torch.device("cpu")


def quantized(name: str, group_size: int | None = None, shape: tuple[int, int] = (128, 1024)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return format_named(name, group_size=group_size).quantize(weight)


@pytest.mark.parametrize("scheme", ["fp8", "bfloat16"])
def test_every_column_has_a_place(scheme) -> None:
    """A column that is twice in the order, and one that is missing."""
    assert torch.equal(column_order(scheme).flatten().sort().values, torch.arange(COLUMNS))


@pytest.mark.parametrize("scheme", ["fp8", "bfloat16"])
def test_a_thread_owns_neighbouring_columns(scheme) -> None:
    """A group whose columns are spread over threads has its table made by each of them."""
    order = column_order(scheme)
    per_word = 4 if scheme == "fp8" else 2
    thread = torch.arange(order.shape[1]) // per_word % 4
    assert (order // 64 == thread).all()


@pytest.mark.parametrize(
    ("name", "group_size", "bits"),
    [("nvfp4", None, 4.5), ("mxfp4", None, 4.25), ("fp4-m1", 128, 4.25), ("int4", 128, 4.25)],
)
def test_bytes(name: str, group_size: int | None, bits: float) -> None:
    """Scales spread over threads that do not need them would be read from memory each step."""
    packed = quantized(name, group_size)
    scheme = scheme_of(packed, dtype=torch.bfloat16, is_fp8=False)
    found = Fragments.of(packed, scheme=scheme, device=CPU)
    assert found.n_bytes == 128 * 1024 * bits / 8 + 4 * 128


def test_a_row_is_laid_out_alone() -> None:
    """A matrix in pieces of rows, as large ones are, is the whole one."""
    packed = quantized("nvfp4", shape=(192, 512))
    whole = Fragments.of(packed, scheme="fp8", device=CPU)
    part = replace(packed, packed=packed.packed[64:128], parts=packed.parts.rows(slice(64, 128)))
    alone = Fragments.of(part, scheme="fp8", device=CPU)
    assert torch.equal(alone.codes[0], whole.codes[1])
    assert torch.equal(alone.scales[0], whole.scales[1])


def test_groups_that_have_no_layout() -> None:
    """INT4 in groups of 16 or 48 would share a thread's scale between groups."""
    assert takes(quantized("int4", 64))
    assert takes(quantized("fp4-m2", 48, shape=(64, 960)))
    assert not takes(quantized("int4", 16))
    with pytest.raises(ValueError, match="float32 activations"):
        scheme_of(quantized("nvfp4"), dtype=torch.float32, is_fp8=False)


def test_dispatch_is_said_to_be_unmeasured_until_it_is() -> None:
    """A table of guesses that passes for one of measurements."""
    assert json.loads(dispatch.FILE.read_text())["measured_on"] is None


def test_splits_follow_the_matrix_alone() -> None:
    """A split that changes with the batch changes a token's last bits with it."""
    table = dispatch.dispatch()
    assert {table.splits(4096, 4096, n_tokens=n) for n in (1, 16, 17, 64)} == {4}
    assert table.splits(14336, 4096, n_tokens=1) == 2
    assert table.splits(4096, 4096, n_tokens=65) == 1
    assert table.splits(64, 512, n_tokens=1) == 1  # too few columns to share


def test_a_file_of_tiles_is_read_strictly() -> None:
    """A misspelt field that is ignored leaves a tile nobody measured."""
    content = json.loads(dispatch.FILE.read_text())
    assert dispatch.parse(content) == dispatch.dispatch()
    tiles = content["fp8"]["tiles"]
    for bad in (tiles[:-1], [tiles[1], tiles[0], tiles[2]]):
        with pytest.raises(ValueError, match="rising bounds"):
            dispatch.parse({**content, "fp8": {**content["fp8"], "tiles": bad}})
    with pytest.raises(TypeError, match="colour"):
        dispatch.parse({**content, "colour": "red"})
    for n_tokens in (1, 16, 17, 64, 65, 10**6):
        tile = table_tile(n_tokens)
        assert tile.up_to is None or tile.up_to >= n_tokens


def table_tile(n_tokens: int) -> dispatch.Tile:
    return dispatch.dispatch().fp8.tile(n_tokens)

"""Which tiles, splits and crossovers are best here, in the form of `kernels/matmul/dispatch.json`.

Copy what `sweep` returns under "dispatch" over that file, and compile ahead again
(`benchmarks/kernels_ahead.py`): its tiles are the dispatched ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from trimtab.kernels.formats import format_named
from trimtab.kernels.matmul import operator
from trimtab.kernels.matmul.dispatch import FILE, Tile, parse
from trimtab.kernels.matmul.fragments import Fragments, Scheme

SHAPES = ((4096, 4096), (4096, 14336))
TOKENS = (16, 32, 64)
# (rows, warps, stages)
CANDIDATES = ((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 8, 3), (128, 8, 4), (128, 4, 3))
SPLITS = (1, 2, 4, 8)
PROGRAMS = (264, 132, 396, 528)  # the first where all are as good
CROSSOVERS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536)
COPIES_BYTES = 300e6
SCHEMES: dict[str, tuple[str, Scheme]] = {
    "fp8": ("nvfp4", "fp8"),
    "half": ("nvfp4", "bfloat16"),
    "int4": ("int4", "int4-bfloat16"),
}
Measure = Callable[[list[Callable[[], Any]], torch.device], float]


def sweep(
    device: torch.device, *, tiny: bool, measure: Measure, left_s: Callable[[], float]
) -> dict[str, Any]:
    """Return every time measured, and the table of the best.

    Args:
        device: a GPU; on a CPU there is nothing to tune, unless Triton interprets there.
        tiny: one small shape, few candidates.
        measure: microseconds of one of some calls.
        left_s: seconds that are left; tiles that are not reached stay as they are.
    """
    if find_spec("triton") is None or (device.type == "cpu" and not _is_interpreted()):
        return {"left_out": "tiles are the Triton kernels', which do not run here"}
    found: list[dict[str, Any]] = []
    content = json.loads(FILE.read_text())
    is_whole = True
    for table, (name, scheme) in SCHEMES.items():
        shapes = ((64, 512),) if tiny else SHAPES
        matrices = [_copies(name, scheme, shape, device, tiny=tiny) for shape in shapes]
        for n_tokens in TOKENS[:1] if tiny else TOKENS:
            if left_s() < 10:
                is_whole = False
                break
            best = _best_tile(matrices, n_tokens, found, device, measure=measure, tiny=tiny)
            _set(content[table]["tiles"], n_tokens, best)
        crossover = _crossover(matrices[0], content[table], found, device, measure, tiny=tiny)
        content[table]["expand_from"] = crossover
        del matrices
    content["programs"] = _programs(found, content)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    content["measured_on"] = where if is_whole else f"{where}, in part"
    return {"times": found, "dispatch": content}


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _copies(
    name: str, scheme: Scheme, shape: tuple[int, int], device: torch.device, *, tiny: bool
) -> list[Fragments]:
    packed = format_named(name).quantize(torch.randn(shape, device=device))
    first = Fragments.of(packed, scheme=scheme, device=device)
    n_more = 1 if tiny else int(COPIES_BYTES / first.n_bytes)
    return [first] + [
        Fragments(scheme, shape, first.codes.clone(), first.scales.clone(), first.rows.clone())
        for _ in range(n_more)
    ]


def _best_tile(
    matrices: list[list[Fragments]],
    n_tokens: int,
    found: list[dict[str, Any]],
    device: torch.device,
    *,
    measure: Measure,
    tiny: bool,
) -> Tile:
    """Return the tile with the least time over all matrices, each with its best split."""
    totals: dict[Tile, float] = {}
    for rows, warps, stages in CANDIDATES[:2] if tiny else CANDIDATES:
        tile = Tile(n_tokens, n_tokens, rows, warps, stages)
        try:
            for copies in matrices:
                times = {}
                for splits in SPLITS[:2] if tiny else SPLITS:
                    times[splits] = _time(copies, n_tokens, tile, splits, device, measure)
                    found.append(_row(copies[0], n_tokens, tile, splits, times[splits]))
                totals[tile] = totals.get(tile, 0.0) + min(times.values())
        except Exception as error:  # too much shared memory, say: no candidate then
            totals.pop(tile, None)
            found.append({"tile": vars(tile), "failed": repr(error)[:200]})
    return min(totals, key=lambda tile: totals[tile])


def _time(
    copies: list[Fragments],
    n_tokens: int,
    tile: Tile,
    splits: int,
    device: torch.device,
    measure: Measure,
) -> float:
    x = torch.randn(n_tokens, copies[0].shape[1], device=device).bfloat16()
    return measure(
        [
            lambda it=it: operator.tile_product(
                x, it.codes, it.scales, it.rows, None, it.scheme, tile=tile, splits=splits
            )
            for it in copies
        ],
        device,
    )


def _row(it: Fragments, n_tokens: int, tile: Tile, splits: int, us: float) -> dict[str, Any]:
    return {
        "scheme": it.scheme,
        "shape": list(it.shape),
        "n_tokens": n_tokens,
        "tile": vars(tile),
        "splits": splits,
        "us": us,
    }


def _set(tiles: list[dict[str, Any]], n_tokens: int, best: Tile) -> None:
    """Put a tile in its place; the last one is also for all more tokens."""
    for at, tile in enumerate(tiles):
        if tile["up_to"] == n_tokens or (tile["up_to"] is None and n_tokens == tile["tokens"]):
            tiles[at] = vars(best) | {"up_to": tile["up_to"]}


def _programs(found: list[dict[str, Any]], content: dict[str, Any]) -> int:
    """Return the number of programs to aim at whose splits take the least time in all."""
    totals = dict.fromkeys(PROGRAMS, 0.0)
    for target in PROGRAMS:
        assumed = parse(content | {"programs": target})
        for row in found:
            if "splits" not in row:
                continue
            tile = assumed.table(row["scheme"]).tile(row["n_tokens"])
            is_chosen = (tile.rows, tile.warps, tile.stages) == tuple(
                row["tile"][name] for name in ("rows", "warps", "stages")
            )
            if is_chosen and row["splits"] == assumed.splits(*row["shape"], n_tokens=1):
                totals[target] += row["us"]
    return min(PROGRAMS, key=lambda target: totals[target] or float("inf"))


def _crossover(
    copies: list[Fragments],
    table: dict[str, Any],
    found: list[dict[str, Any]],
    device: torch.device,
    measure: Measure,
    *,
    tiny: bool,
) -> int:
    """Return the least number of tokens from which expanding the matrix is always faster."""
    # Where expanding does not pay even for the most tokens tried, it is left for twice as many.
    most = CROSSOVERS[-1]
    tile, least = Tile(**table["tiles"][-1]), 2 * most
    for n_tokens in reversed((16, 32) if tiny else CROSSOVERS):
        x = torch.randn(n_tokens, copies[0].shape[1], device=device).bfloat16()
        whole = measure(
            [
                lambda it=it, x=x: operator._expanded_product(
                    x, it.codes, it.scales, it.rows, None, it.scheme
                )
                for it in copies
            ],
            device,
        )
        tiled = _time(copies, n_tokens, tile, 1, device, measure)
        found.append({"n_tokens": n_tokens, "expanded_us": whole, "tiles_us": tiled})
        if whole > tiled:
            break
        least = n_tokens
    return least

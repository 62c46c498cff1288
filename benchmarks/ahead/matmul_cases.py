"""The kernels of 4-bit products, at every tile that is dispatched to.

Limits: at 4.3 TB/s and 0.5625 bytes a weight (NVFP4) an H200's 132 multiprocessors, 128 lanes each
at 1.755 to 1.98 GHz, can issue 3.9 to 4.4 instructions for each weight that memory brings.
"""

from __future__ import annotations

from typing import Any

from compiling import Case

from trimtab.kernels.matmul.dispatch import Tile, dispatch

PACKAGE = "trimtab.kernels.matmul"
HALF_LIMIT, FP8_LIMIT = 4.2, 3.1
SHORT = {"bf16": "bfloat16", "fp16": "float16"}


def cases() -> list[Case]:
    """Return all of them."""
    table = dispatch()
    found = []
    for tile in table.fp8.tiles:
        found += [_w4a8(tile, group=16), _w4a8(tile, group=32, is_gated=False)]
    for tile in table.half.tiles:
        found += [
            _w4a16(tile, kind="bf16", group=16),
            _w4a16(tile, kind="fp16", group=16, is_gated=tile.tokens == 16),
            _w4a16(tile, kind="bf16", group=32, is_gated=False),
        ]
    for tile in table.int4.tiles:
        found += [
            _w4a16(tile, kind="bf16", group=128, is_int4=True, is_gated=tile.tokens == 16),
            _w4a16(tile, kind="fp16", group=64, is_int4=True, is_gated=False),
        ]
    first = table.fp8.tiles[0], table.half.tiles[0]
    found += [
        _w4a8(first[0], group=16, splits=4, is_gated=False),
        _w4a8(first[0], group=16, has_bias=True, is_gated=False),
        _w4a8(first[0], group=16, splits=2, is_one_token=True),
        _w4a16(first[1], kind="bf16", group=16, splits=4, is_gated=False),
        _w4a16(first[1], kind="bf16", group=16, is_whole=False, is_gated=False),
    ]
    return found + _beside()


def _w4a8(
    tile: Tile,
    *,
    group: int,
    splits: int = 1,
    has_bias: bool = False,
    is_one_token: bool = False,
    is_gated: bool = True,
) -> Case:
    arguments: dict[str, Any] = {
        "x": "*fp8e4nv",
        "token_scales": "*fp32",
        "codes": "*u8",
        "scales": "*u8",
        "rows": "*fp32",
        "y": "*fp32" if splits > 1 else "*bf16",
        "n_tokens": "i32",
        "n_out": "i32",
        "n_blocks": "i32",
    }
    constants: dict[str, Any] = {
        "BM": tile.tokens,
        "BN": tile.rows,
        "EACH": 64 // group,
        "SPLITS": splits,
        "STAGES": tile.stages,
    }
    (arguments if has_bias else constants)["bias"] = "*bf16" if has_bias else None
    if is_one_token:  # Triton makes a kernel of its own where an argument is 1
        del arguments["n_tokens"]
        constants["n_tokens"] = 1
    more = f" split {splits}" * (splits > 1) + " bias" * has_bias + " one" * is_one_token
    return Case(
        name=f"w4a8 g{group} {tile.tokens}x{tile.rows}{more}",
        kernel=f"{PACKAGE}.products:w4a8",
        arguments=arguments,
        constants=constants,
        aligned=("x", "token_scales", "codes", "scales", "rows", "y", "n_out"),
        warps=tile.warps,
        weights=256 * tile.rows,
        most_per_weight=FP8_LIMIT,
        has_product=True,
        is_gated=is_gated,
    )


def _w4a16(
    tile: Tile,
    *,
    kind: str,
    group: int,
    is_int4: bool = False,
    splits: int = 1,
    is_whole: bool = True,
    is_gated: bool = True,
) -> Case:
    threads = 2 if is_int4 and group == 128 else 4
    more = " int4" * is_int4 + f" split {splits}" * (splits > 1) + " ragged" * (not is_whole)
    return Case(
        name=f"w4a16 {kind} g{group} {tile.tokens}x{tile.rows}{more}",
        kernel=f"{PACKAGE}.products:w4a16",
        arguments={
            "x": f"*{kind}",
            "codes": "*u16",
            "scales": "*i32" if is_int4 else "*u8",
            "rows": "*fp32",
            "y": "*fp32" if splits > 1 else f"*{kind}",
            "n_tokens": "i32",
            "n_out": "i32",
            "n_in": "i32",
            "n_blocks": "i32",
            "x_stride": "i32",
        },
        constants={
            "bias": None,
            "BM": tile.tokens,
            "BN": tile.rows,
            "THREADS": threads,
            "EACH": max(1, 64 // group),
            "SPLITS": splits,
            "STAGES": tile.stages,
            "IS_WHOLE": is_whole,
        },
        aligned=("x", "codes", "scales", "rows", "y", "n_out", "n_in", "x_stride"),
        warps=tile.warps,
        weights=256 * tile.rows,
        # Columns that are no multiple of 256 have a mask more.
        most_per_weight=HALF_LIMIT if is_whole else None,
        has_product=True,
        is_gated=is_gated,
    )


def _beside() -> list[Case]:
    """Return what runs before, after and instead of the products."""
    quantize = {
        "x": "*bf16",
        "q": "*fp8e4nv",
        "scales": "*fp32",
        "n_in": "i32",
        "n_places": "i32",
        "x_stride": "i32",
    }
    expand = {"codes": "*u8", "scales": "*u8", "w": "*fp8e4nv", "n_rows": "i32", "n_blocks": "i32"}
    half = {
        "codes": "*u16",
        "scales": "*u8",
        "rows": "*fp32",
        "w": "*bf16",
        "n_out": "i32",
        "n_in": "i32",
        "n_blocks": "i32",
    }
    sums = {"partial": "*fp32", "rows": "*fp32", "y": "*bf16", "n_tokens": "i32", "n_out": "i32"}
    whole = {"THREADS": 4, "EACH": 4, "IS_BFLOAT16": True}
    return [
        Case(
            name=f"quantize_tokens {block}",
            kernel=f"{PACKAGE}.tokens:quantize_tokens",
            arguments=quantize,
            constants={"BLOCK": block, "IS_ONE": is_one, "IS_ORDERED": False},
            aligned=tuple(quantize),
            warps=max(4, min(16, block // 1024)),
            is_gated=block == 16384,
        )
        for block, is_one in ((4096, True), (16384, True), (32768, True), (8192, False))
    ] + [
        Case(
            name="w4a8_scaled 16x128 on Blackwell",
            kernel=f"{PACKAGE}.scaled_product:w4a8_scaled",
            arguments={
                "x": "*fp8e4nv",
                "token_scales": "*fp32",
                "codes": "*u8",
                "scales": "*u8",
                "y": "*bf16",
                "n_tokens": "i32",
                "n_out": "i32",
                "n_in": "i32",
            },
            constants={"bias": None, "BM": 16, "BN": 128, "BK": 256, "STAGES": 4},
            aligned=("x", "token_scales", "codes", "scales", "y", "n_out", "n_in"),
            has_product=True,
            holds="kind::mxf8f6f4.block_scale",
            architecture=100,
        ),
        Case(
            name="expand_fp8",
            kernel=f"{PACKAGE}.expand:expand_fp8",
            arguments=expand,
            constants={"EACH": 4},
            aligned=("codes", "scales", "w"),
        ),
        Case(
            name="expand_half bf16",
            kernel=f"{PACKAGE}.expand:expand_half",
            arguments=half,
            constants=whole,
            aligned=("codes", "scales", "rows", "w", "n_in"),
            is_gated=False,
        ),
        Case(
            name="add_splits 4",
            kernel=f"{PACKAGE}.sums:add_splits",
            arguments=sums | {"token_scales": "*fp32"},
            constants={"bias": None, "SPLITS": 4, "BLOCK": 512},
            aligned=("partial", "rows", "y", "n_out"),
            is_gated=False,
        ),
    ]

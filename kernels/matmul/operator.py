"""The product with a matrix in fragments, as an operator that torch.compile and graphs can hold.

Nothing here waits for the device, and what is launched depends on shapes alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.kernels.matmul.dispatch import Tile, dispatch
from trimtab.kernels.matmul.fragments import COLUMNS, ROWS

_ONE_BLOCK = 1 << 15  # columns that a program of 16 warps holds in registers
_TURN = 1 << 13  # columns at a time of tokens that are longer
_SUM_BLOCK = 512


@torch.library.custom_op("trimtab::four_bit_product", mutates_args=())
def four_bit_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    """Return `x W^T + bias`.

    Args:
        x: `[n_tokens, n_in]`, bfloat16 or float16; a row's elements are neighbours.
        codes, scales, rows: as in `Fragments`.
        bias: `[n_out]` in x's dtype, or None.
        scheme: as in `Fragments`.

    Returns:
        `[n_tokens, n_out]` in x's dtype.

    Raises:
        ValueError: a row whose elements are apart.
    """
    check_rows(x)
    n_tokens, n_out = x.shape[0], rows.shape[0]
    if not n_tokens:
        return x.new_empty(0, n_out)
    table = dispatch().table(scheme)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whosever the tensors
        if n_tokens >= table.expand_from:
            return _expanded_product(x, codes, scales, rows, bias, scheme)
        return tile_product(
            x,
            codes,
            scales,
            rows,
            bias,
            scheme,
            tile=table.tile(n_tokens),
            splits=dispatch().splits(n_out, x.shape[1], n_tokens=n_tokens),
        )


@four_bit_product.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


def check_rows(x: torch.Tensor) -> None:
    """Refuse tokens `[n_tokens, n_in]` whose elements are apart; a copy would go unnoticed."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"activations with strides {x.stride()}; a row must be in one piece")


def tile_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    *,
    tile: Tile,
    splits: int,
) -> torch.Tensor:
    """Return the product by one tile and split; arguments as of `four_bit_product`."""
    from trimtab.kernels.matmul import products, sums

    (n_tokens, n_in), n_out, n_blocks = x.shape, rows.shape[0], codes.shape[1]
    y = x.new_empty(n_tokens, n_out)
    out = y
    if splits > 1:
        out = torch.empty(splits, n_tokens, n_out, dtype=torch.float32, device=x.device)
    grid = (-(-n_out // tile.rows), splits, -(-n_tokens // tile.tokens))
    threads, each = scales.shape[3:]
    shape = {"BM": tile.tokens, "BN": tile.rows, "EACH": each, "SPLITS": splits}
    options = {"STAGES": tile.stages, "num_warps": tile.warps}
    token_scales = None
    if scheme == "fp8":
        q, token_scales = quantize_tokens(x)
        products.w4a8[grid](
            q,
            token_scales,
            codes,
            scales,
            rows,
            bias,
            out,
            n_tokens,
            n_out,
            n_blocks,
            **shape,
            **options,
        )
    else:
        products.w4a16[grid](
            x,
            codes.view(torch.uint16),
            scales,
            rows,
            bias,
            out,
            n_tokens,
            n_out,
            n_in,
            n_blocks,
            x.stride(0),
            THREADS=threads,
            IS_WHOLE=n_in % COLUMNS == 0,
            **shape,
            **options,
        )
    if splits > 1:
        sums.add_splits[(n_tokens, -(-n_out // _SUM_BLOCK))](
            out,
            token_scales,
            rows,
            bias,
            y,
            n_tokens,
            n_out,
            SPLITS=splits,
            BLOCK=_SUM_BLOCK,
            num_warps=4,
        )
    return y


def quantize_tokens(
    x: torch.Tensor, *, is_ordered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens in FP8 and their scales.

    Args:
        x: `[n_tokens, n_in]`, any floating dtype; a row's elements are neighbours.
        is_ordered: columns stay as they are, instead of the order of fragments.

    Returns:
        `[n_tokens, n_places]`, float8_e4m3fn, n_in up to a multiple of 256, zeros where no column
        is (n_in itself if ordered); `[n_tokens]`, float32.
    """
    from trimtab.kernels.matmul import tokens

    n_tokens, n_in = x.shape
    n_places = n_in if is_ordered else -(-n_in // COLUMNS) * COLUMNS
    is_one = n_places <= _ONE_BLOCK
    block = 1 << (n_places - 1).bit_length() if is_one else _TURN
    q = torch.empty(n_tokens, n_places, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(n_tokens, dtype=torch.float32, device=x.device)
    tokens.quantize_tokens[(n_tokens,)](
        x,
        q,
        scales,
        n_in,
        n_places,
        x.stride(0),
        BLOCK=block,
        IS_ONE=is_one,
        IS_ORDERED=is_ordered,
        num_warps=max(4, min(16, block // 1024)),
    )
    return q, scales


def expanded_fp8(codes: torch.Tensor, scales: torch.Tensor, *, n_rows: int) -> torch.Tensor:
    """Return the levels of an FP8 matrix, `[n_rows, n_places]`, float8_e4m3fn, without `rows`.

    Columns are in the order of fragments; n_rows may reach into the padding.
    """
    from trimtab.kernels.matmul import expand

    n_tiles, n_blocks = codes.shape[:2]
    w = torch.empty(n_rows, n_blocks * COLUMNS, dtype=torch.float8_e4m3fn, device=codes.device)
    expand.expand_fp8[(n_blocks, n_tiles)](
        codes, scales, w, n_rows, n_blocks, EACH=scales.shape[4], num_warps=4
    )
    return w


def expanded_half(
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    scheme: str,
    *,
    n_in: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the whole matrix, `[n_out, n_in]` in a dtype, columns as they are."""
    from trimtab.kernels.matmul import expand

    n_tiles, n_blocks = codes.shape[:2]
    w = torch.empty(rows.shape[0], n_in, dtype=dtype, device=codes.device)
    expand.expand_half[(n_blocks, n_tiles)](
        codes.view(torch.uint16),
        scales,
        rows,
        w,
        rows.shape[0],
        n_in,
        n_blocks,
        THREADS=scales.shape[3],
        EACH=scales.shape[4],
        IS_BFLOAT16=scheme.endswith("bfloat16"),
        num_warps=4,
    )
    return w


def _expanded_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    """Expand the matrix to scratch memory, and leave the product to torch."""
    n_out = rows.shape[0]
    if scheme != "fp8":
        w = expanded_half(codes, scales, rows, scheme, n_in=x.shape[1], dtype=x.dtype)
        return F.linear(x, w, bias)
    q, token_scales = quantize_tokens(x)
    n_rows = -(-n_out // 16) * 16  # torch's FP8 product has no other widths
    w = expanded_fp8(codes, scales, n_rows=min(n_rows, codes.shape[0] * ROWS))
    if x.is_cuda:
        y = torch._scaled_mm(
            q,
            w.T,
            scale_a=token_scales.unsqueeze(1),
            scale_b=F.pad(rows, (0, n_rows - n_out)).unsqueeze(0),
            out_dtype=torch.bfloat16,  # all that torch has for scales by row
            use_fast_accum=False,
        )[:, :n_out].to(x.dtype)
    else:  # the interpreter's
        sums = q.float() @ w[:n_out].float().T
        y = (sums * token_scales.unsqueeze(1) * rows).to(x.dtype)
    return y if bias is None else y + bias

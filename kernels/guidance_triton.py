"""Classifier guidance on a GPU: all steps in one launch, what they change in another.

    z = h W^T + b                                      torch
    total = the sum of the steps' a_k u_k             `steps`, 16 tokens a program
    h' = h - total W, its norm, one cast               `apply`, 16 tokens and 128 columns a program

A program of `steps` walks through its layers in blocks of 32 units, which it passes on to its own
threads through memory that stays in the cache: a whole layer in registers spills from 128 units on.
`guidance.py` is the specification. Products are taken in three TF32 parts, which is float32 but for
the last bit; the interpreter takes them in float32. What a token gets does not depend on who is in
the batch with it. Compiled ahead for sm_90a in `benchmarks/kernels_ahead.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimtab.kernels.steer_triton import keep_norm, warps

MOST_LABELS = 64
"""Labels whose logits a program holds in registers."""

_TOKENS = 16  # of a program; the tensor cores' least
_BLOCK = 32  # units of a layer at once; with 64 registers spill
_COLUMNS = 128  # of the residual stream that a program of `apply` changes
_LEAST = 16  # a product's least size in every direction


def steps(
    z: torch.Tensor,
    *,
    b_in: torch.Tensor,
    gram: torch.Tensor,
    middle: tuple[torch.Tensor | None, ...],
    toward: torch.Tensor,
    away: torch.Tensor,
    sizes: torch.Tensor,
    picks_rival: torch.Tensor,
    until: torch.Tensor,
    loss: str,
    step: str,
    is_exclusive: bool,
    has_rival: bool,
    has_until: bool,
) -> torch.Tensor:
    """Return the sum of all steps in the classifier's narrow space, `[n_tokens, d_in]`, float32.

    Args:
        z: the classifier's first layer, `[n_tokens, d_in]`, float32; used up.
        b_in, gram: `guidance.Classifier`'s.
        middle: its w_mid, b_mid, w_out, b_out; None each if it is linear.
        toward, away, sizes, picks_rival, until: `guidance.Goals`'.
        loss, step, has_rival, has_until: as for `guidance.guide`.
        is_exclusive: `guidance.Classifier`'s.

    Raises:
        ValueError: a tensor on another device, or with strides the kernel cannot read.
    """
    n_tokens, d_in = z.shape
    n_labels = toward.shape[1]
    is_linear = middle[0] is None
    w_mid, b_mid, w_out, b_out = (b_in if part is None else part for part in middle)
    _check(z.device, z=z, b_in=b_in, gram=gram, w_mid=w_mid, b_mid=b_mid, w_out=w_out, b_out=b_out)
    _check_device(z.device, toward, away, sizes, picks_rival, until)
    total = torch.zeros_like(z)
    if n_tokens == 0:
        return total
    d_mid = w_mid.shape[0]
    inner, back = z.new_empty(2, n_tokens, 0 if is_linear else d_mid)
    u, moved = torch.empty_like(z), torch.empty_like(z)
    with torch.cuda.device_of(z):
        _steps[(triton.cdiv(n_tokens, _TOKENS),)](
            z,
            total,
            inner,
            back,
            u,
            moved,
            b_in,
            gram,
            w_mid,
            b_mid,
            w_out,
            b_out,
            toward,
            away,
            sizes,
            picks_rival,
            until,
            n_tokens,
            sizes.shape[1],
            *toward.stride(),
            *away.stride(),
            *sizes.stride(),
            picks_rival.stride(0),
            until.stride(0),
            D_IN=d_in,
            D_MID=d_mid,
            N_LABELS=n_labels,
            LOSS=loss,
            STEP=step,
            IS_LINEAR=is_linear,
            IS_EXCLUSIVE=is_exclusive,
            HAS_RIVAL=has_rival,
            HAS_UNTIL=has_until,
            **launched(d_in=d_in, d_mid=d_mid, n_labels=n_labels),
        )
    return total


def apply(
    hidden: torch.Tensor,
    total: torch.Tensor,
    *,
    w_in: torch.Tensor,
    sizes: torch.Tensor,
    keeps_norm: torch.Tensor | None,
) -> torch.Tensor:
    """Return `hidden` less what the steps sum up to, in its dtype.

    Args:
        hidden: `[n_tokens, d_model]`, any floating dtype, any strides.
        total: `[n_tokens, d_in]`, float32.
        w_in: `[d_in, d_model]`, float32.
        sizes: `[n_tokens, n_steps]`, float32; a token whose sizes are all 0 keeps every bit.
        keeps_norm: whether |h| is restored, `[n_tokens]`, bool; None means nowhere.

    Raises:
        ValueError: a tensor on another device, or with strides the kernel cannot read.
    """
    n_tokens, width = hidden.shape
    _check(hidden.device, total=total, w_in=w_in)
    _check_device(hidden.device, sizes, *([] if keeps_norm is None else [keeps_norm]))
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if n_tokens == 0:
        return out
    # A norm is over the whole row: then a second launch reads what is not yet rounded.
    wide = out if keeps_norm is None else torch.empty_like(out, dtype=torch.float32)
    d_in = w_in.shape[0]
    with torch.cuda.device_of(hidden):
        _apply[(triton.cdiv(n_tokens, _TOKENS), triton.cdiv(width, _COLUMNS))](
            hidden,
            total,
            w_in,
            sizes,
            wide,
            n_tokens,
            sizes.shape[1],
            *hidden.stride(),
            *sizes.stride(),
            D_IN=d_in,
            WIDTH=width,
            **launched(d_in=d_in),
        )
        if keeps_norm is not None:
            block = triton.next_power_of_2(width)
            keep_norm[(n_tokens,)](
                hidden,
                wide,
                keeps_norm,
                out,
                *hidden.stride(),
                keeps_norm.stride(0),
                WIDTH=width,
                BLOCK=block,
                num_warps=warps(block),
            )
    return out


def launched(*, d_in: int, d_mid: int | None = None, n_labels: int = 0) -> dict[str, int]:
    """Return the sizes of a program of `steps`, or of `apply` if no middle layer is named."""
    units = min(_BLOCK, _padded(d_in))
    if d_mid is None:
        return {"TOKENS": _TOKENS, "UNITS": units, "COLUMNS": _COLUMNS, "num_warps": 8}
    others = {"MID": min(_BLOCK, _padded(d_mid)), "LABELS": _padded(n_labels)}
    return {"TOKENS": _TOKENS, "IN": units, **others, "num_warps": 8}


def _padded(n: int) -> int:
    return max(_LEAST, triton.next_power_of_2(n))


def _check_device(device: torch.device, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"guide: goals on {tensor.device}, hidden on {device}")


def _check(device: torch.device, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"guide: {name} is on {tensor.device}, hidden on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"guide: {name} is not contiguous: strides {tensor.stride()}")


@triton.jit(do_not_specialize=["n_tokens", "n_steps"])
def _steps(
    z,
    total,
    inner,
    back,
    u,
    moved,
    b_in,
    gram,
    w_mid,
    b_mid,
    w_out,
    b_out,
    toward,
    away,
    sizes,
    picks_rival,
    until,
    n_tokens,
    n_steps,
    toward_token,
    toward_label,
    away_token,
    away_label,
    sizes_token,
    sizes_step,
    rival_token,
    until_token,
    D_IN: tl.constexpr,
    D_MID: tl.constexpr,
    N_LABELS: tl.constexpr,
    LOSS: tl.constexpr,
    STEP: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    IS_EXCLUSIVE: tl.constexpr,
    HAS_RIVAL: tl.constexpr,
    HAS_UNTIL: tl.constexpr,
    TOKENS: tl.constexpr,
    IN: tl.constexpr,
    MID: tl.constexpr,
    LABELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    label = tl.arange(0, LABELS)
    is_token, is_label = token < n_tokens, label < N_LABELS
    is_named = is_token[:, None] & is_label[None, :]
    at = toward + token[:, None] * toward_token + label[None, :] * toward_label
    wanted = tl.load(at, mask=is_named, other=0).to(tl.float32)
    at = away + token[:, None] * away_token + label[None, :] * away_label
    named = tl.load(at, mask=is_named, other=0).to(tl.float32)
    shunned = named
    pull, push = _share(wanted), _share(named)
    picks = tl.load(picks_rival + token * rival_token, mask=is_token, other=0).to(tl.int32)
    bound = tl.load(until + token * until_token, mask=is_token, other=2.0)
    # One stage: a pipelined loop would load a step's z before the step before has stored it.
    for k in tl.range(0, n_steps, num_stages=1):
        # Up: logits, and what the middle layer's units are.
        if IS_LINEAR:
            logits = _rows(z, token, label, n_tokens, D_IN)
        else:
            logits = tl.zeros((TOKENS, LABELS), tl.float32)
            logits += tl.load(b_out + label, mask=is_label, other=0.0)[None, :]
            for j in tl.range(0, D_MID, MID, num_stages=2):
                middle = j + tl.arange(0, MID)
                units = tl.zeros((TOKENS, MID), tl.float32)
                units += tl.load(b_mid + middle, mask=middle < D_MID, other=0.0)[None, :]
                for i in tl.range(0, D_IN, IN, num_stages=2):
                    entry = i + tl.arange(0, IN)
                    below = tl.maximum(_rows(z, token, entry, n_tokens, D_IN), 0.0)
                    units += _times(below, _block(w_mid, entry, middle, D_IN, D_MID, 1, D_IN))
                _put(inner, units, token, middle, n_tokens, D_MID)
                head = _block(w_out, middle, label, D_MID, N_LABELS, 1, D_MID)
                logits += _times(tl.maximum(units, 0.0), head)
        logits = tl.where(is_label[None, :], logits, float("-inf"))
        if HAS_RIVAL:
            best = tl.argmax(tl.where(wanted > 0, float("-inf"), logits), axis=1)
            is_rival = (label[None, :] == best[:, None]) & (picks[:, None] != 0) & (wanted == 0)
            shunned = tl.where(is_rival & is_label[None, :], 1.0, named)
            push = _share(shunned)
        if LOSS == "logits":
            slope = push - pull
        elif LOSS == "sigmoid":
            slope = _sigmoid(logits) * (pull + push) - pull
        else:
            change = push - pull
            slope = change - _softmax(logits) * tl.sum(change, axis=1)[:, None]
        # Down again: u, the gradient by z.
        if IS_LINEAR:
            _put(u, slope, token, label, n_tokens, D_IN)
        else:
            tl.debug_barrier()
            for j in tl.range(0, D_MID, MID, num_stages=2):
                middle = j + tl.arange(0, MID)
                from_above = _times(slope, _block(w_out, label, middle, N_LABELS, D_MID, D_MID, 1))
                is_above = _rows(inner, token, middle, n_tokens, D_MID) > 0
                _put(back, tl.where(is_above, from_above, 0.0), token, middle, n_tokens, D_MID)
            tl.debug_barrier()
            for i in tl.range(0, D_IN, IN, num_stages=2):
                entry = i + tl.arange(0, IN)
                down = tl.zeros((TOKENS, IN), tl.float32)
                for j in tl.range(0, D_MID, MID, num_stages=2):
                    middle = j + tl.arange(0, MID)
                    from_above = _rows(back, token, middle, n_tokens, D_MID)
                    down += _times(from_above, _block(w_mid, middle, entry, D_MID, D_IN, D_IN, 1))
                is_above = _rows(z, token, entry, n_tokens, D_IN) > 0
                _put(u, tl.where(is_above, down, 0.0), token, entry, n_tokens, D_IN)
        tl.debug_barrier()
        # Where u moves z, and how long it is in the wide space.
        squared = tl.zeros((TOKENS,), tl.float32)
        along = tl.zeros((TOKENS,), tl.float32)
        for i in tl.range(0, D_IN, IN, num_stages=2):
            entry = i + tl.arange(0, IN)
            among = tl.zeros((TOKENS, IN), tl.float32)
            for j in tl.range(0, D_IN, IN, num_stages=2):
                other = j + tl.arange(0, IN)
                by = _rows(u, token, other, n_tokens, D_IN)
                among += _times(by, _block(gram, other, entry, D_IN, D_IN, D_IN, 1))
            mine = _rows(u, token, entry, n_tokens, D_IN)
            squared += tl.sum(mine * among, axis=1)
            if STEP == "reflect":
                bias = tl.load(b_in + entry, mask=entry < D_IN, other=0.0)
                here = _rows(z, token, entry, n_tokens, D_IN)
                along += tl.sum((here - bias[None, :]) * mine, axis=1)
            _put(moved, among, token, entry, n_tokens, D_IN)
        size = tl.load(sizes + token * sizes_token + k * sizes_step, mask=is_token, other=0.0)
        # Where the gradient vanishes u is zero, and so is any multiple of it.
        squared = tl.maximum(squared, 1e-30)
        if STEP == "unit":
            size = tl.div_rn(size, tl.sqrt_rn(squared))
        elif STEP == "reflect":
            size = tl.div_rn(size * 2 * along, squared)
        if HAS_UNTIL:
            if IS_EXCLUSIVE:
                p = _softmax(logits)
                has_wanted = tl.sum(wanted, axis=1) > 0
                likely = tl.where(has_wanted, tl.sum(p * wanted, axis=1), 1.0)
                unlikely = tl.sum(p * shunned, axis=1)
            else:
                p = _sigmoid(logits)
                likely = tl.min(tl.where(wanted > 0, p, 1.0), axis=1)
                unlikely = tl.max(p * shunned, axis=1)
            size = tl.where((likely >= bound) & (unlikely <= 1 - bound), 0.0, size)
        tl.debug_barrier()
        for i in tl.range(0, D_IN, IN, num_stages=2):
            entry = i + tl.arange(0, IN)
            here = _rows(z, token, entry, n_tokens, D_IN)
            here -= size[:, None] * _rows(moved, token, entry, n_tokens, D_IN)
            so_far = _rows(total, token, entry, n_tokens, D_IN)
            so_far += size[:, None] * _rows(u, token, entry, n_tokens, D_IN)
            tl.debug_barrier()
            _put(z, here, token, entry, n_tokens, D_IN)
            _put(total, so_far, token, entry, n_tokens, D_IN)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n_tokens", "n_steps"])
def _apply(
    hidden,
    total,
    w_in,
    sizes,
    out,
    n_tokens,
    n_steps,
    hidden_token,
    hidden_entry,
    sizes_token,
    sizes_step,
    D_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = token < n_tokens, column < WIDTH
    is_here = is_token[:, None] & is_column[None, :]
    change = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for begin in range(0, D_IN, UNITS):
        unit = begin + tl.arange(0, UNITS)
        is_unit = unit < D_IN
        u = tl.load(
            total + token[:, None] * D_IN + unit[None, :],
            mask=is_token[:, None] & is_unit[None, :],
            other=0.0,
        )
        w = tl.load(
            w_in + unit[:, None].to(tl.int64) * WIDTH + column[None, :],
            mask=is_unit[:, None] & is_column[None, :],
            other=0.0,
        )
        change += _times(u, w)
    is_moved = tl.zeros((TOKENS,), tl.int32)
    for k in range(n_steps):
        size = tl.load(sizes + token * sizes_token + k * sizes_step, mask=is_token, other=0.0)
        is_moved |= (size != 0).to(tl.int32)
    from_here = hidden + token[:, None] * hidden_token + column[None, :] * hidden_entry
    raw = tl.load(from_here, mask=is_here, other=0.0)
    guided = (raw.to(tl.float32) - change).to(out.dtype.element_ty)
    kept = tl.where(is_moved[:, None] != 0, guided, raw.to(out.dtype.element_ty))
    tl.store(out + token[:, None] * WIDTH + column[None, :], kept, mask=is_here)


@triton.jit
def _rows(matrix, token, entry, n_tokens, WIDTH: tl.constexpr):
    """Return some entries of the tokens' rows, zeros beyond their end."""
    is_inside = (token < n_tokens)[:, None] & (entry < WIDTH)[None, :]
    return tl.load(matrix + token[:, None] * WIDTH + entry[None, :], mask=is_inside, other=0.0)


@triton.jit
def _put(matrix, values, token, entry, n_tokens, WIDTH: tl.constexpr):
    is_inside = (token < n_tokens)[:, None] & (entry < WIDTH)[None, :]
    tl.store(matrix + token[:, None] * WIDTH + entry[None, :], values, mask=is_inside)


@triton.jit
def _block(
    matrix,
    row,
    column,
    N_ROWS: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """Return a part of a matrix with strides ROW and COLUMN, zeros beyond its end."""
    is_inside = (row < N_ROWS)[:, None] & (column < N_COLUMNS)[None, :]
    at = matrix + row[:, None] * ROW + column[None, :] * COLUMN
    return tl.load(at, mask=is_inside, other=0.0)


@triton.jit
def _times(x, w):
    return tl.dot(x, w, input_precision="tf32x3")


@triton.jit
def _share(labels):
    """Return 1/n at each of a token's n labels."""
    return labels / tl.maximum(tl.sum(labels, axis=1), 1.0)[:, None]


@triton.jit
def _softmax(logits):
    raised = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return raised / tl.sum(raised, axis=1)[:, None]


@triton.jit
def _sigmoid(logits):
    return 1.0 / (1.0 + tl.exp(-logits))

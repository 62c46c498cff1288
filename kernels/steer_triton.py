"""The steering op as one launch: a program reads one token, changes it, writes it once.

All that varies from request to request (slots, gates, rows, low-rank pairs, wishes for the norm) is
read from the bank's buffers, so what is launched does not depend on who is in the batch: it may be
captured in a CUDA graph and replayed after the buffers' contents have changed. A token without an
open slot that does something here is not written at all, or copied as it is.

`steer.py` is the specification. float32 throughout, one cast at the store. Compiled ahead for
sm_90a in `benchmarks/kernels_ahead.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def steer(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    *,
    rows: torch.Tensor,
    row_of: torch.Tensor,
    norm: torch.Tensor,
    low_a: torch.Tensor,
    low_b: torch.Tensor,
    low_of: torch.Tensor,
    gates: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    has_low_rank: bool = True,
    has_norm: bool = True,
) -> torch.Tensor:
    """Launch `steer.steer` or, with `residual`, `steer.steer_stream`.

    Args:
        hidden: `[n_tokens, d_model]`, any floating dtype, any strides.
        slots: `[n_tokens, n_parts]`, int64.
        rows, row_of, norm, low_a, low_b, low_of: `steer.LayerBank`'s.
        gates: `[n_tokens, n_parts]`, float32; None means 1.
        residual: added to `hidden` to make the stream, and set to 0 where a token was changed;
            only if `out` is `hidden`.
        out: where the result goes, of `hidden`'s shape and dtype; may be `hidden`.
        has_low_rank, has_norm: as for `steer.steer`. What is not there costs next to nothing, and
            another kernel has to be compiled: who serves leaves them.

    Raises:
        ValueError: a tensor on another device, of a type or with strides the kernel cannot read.
    """
    n_tokens, width = hidden.shape
    if out is None:
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _check_row_major(
        hidden.device, rows=rows, low_a=low_a, low_b=low_b, row_of=row_of, norm=norm, low_of=low_of
    )
    if slots.dtype != torch.int64 or slots.device != hidden.device:
        raise ValueError(f"steer: slots are {slots.dtype} on {slots.device}")
    if gates is not None and (gates.dtype != torch.float32 or gates.device != hidden.device):
        raise ValueError(f"steer: gates are {gates.dtype} on {gates.device}")
    is_in_place = out.data_ptr() == hidden.data_ptr()
    if residual is not None and not is_in_place:
        raise ValueError("steer: a residual is only changed together with hidden, in place")
    if n_tokens == 0:
        return out
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(hidden):
        _steer[(n_tokens,)](
            hidden,
            hidden if residual is None else residual,
            out,
            slots,
            slots if gates is None else gates,
            rows,
            row_of,
            norm,
            low_a,
            low_b,
            low_of,
            *hidden.stride(),
            *(hidden if residual is None else residual).stride(),
            *out.stride(),
            *slots.stride(),
            *(slots if gates is None else gates).stride(),
            WIDTH=width,
            N_PARTS=slots.shape[1],
            RANK=low_of.shape[1],
            RANK_BLOCK=triton.next_power_of_2(low_of.shape[1]),
            HAS_LOW_RANK=has_low_rank,
            HAS_NORM=has_norm,
            HAS_GATES=gates is not None,
            HAS_RESIDUAL=residual is not None,
            IS_IN_PLACE=is_in_place,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def shift(
    h: torch.Tensor,
    change: torch.Tensor,
    *,
    keeps_norm: torch.Tensor | bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch `steer.shift`.

    Raises:
        ValueError: shapes, types or devices that do not belong together.
    """
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device) if out is None else out
    n_tokens, width = h.shape
    is_asked = isinstance(keeps_norm, torch.Tensor)
    asked = keeps_norm if isinstance(keeps_norm, torch.Tensor) else h
    if change.shape != h.shape or out.shape != h.shape or change.dtype != torch.float32:
        raise ValueError(f"shift: {tuple(h.shape)}, {tuple(change.shape)}, {tuple(out.shape)}")
    if is_asked and (asked.numel() != n_tokens or asked.dtype != torch.bool):
        raise ValueError(f"shift: keeps_norm {tuple(asked.shape)} of {asked.dtype}")
    if len({tensor.device for tensor in (h, change, out, asked)}) > 1:
        raise ValueError("shift: tensors on different devices")
    if n_tokens == 0:
        return out
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(h):
        _shift[(n_tokens,)](
            h,
            change,
            asked,
            out,
            *h.stride(),
            *change.stride(),
            asked.stride(0),
            *out.stride(),
            WIDTH=width,
            KEEPS_NORM=is_asked or keeps_norm is True,
            IS_ASKED=is_asked,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def warps(block: int) -> int:
    """Return the warps of a program that holds a row: 16 values of each array a thread."""
    return max(1, min(16, block // 512))


def _check_row_major(device: torch.device, **buffers: torch.Tensor) -> None:
    for name, buffer in buffers.items():
        if buffer.device != device:
            raise ValueError(f"steer: {name} is on {buffer.device}, hidden on {device}")
        if not buffer.is_contiguous():
            raise ValueError(f"steer: {name} is not contiguous: strides {buffer.stride()}")


# Where a layer's share of a buffer begins depends on the layer: no kernel of its own for each
# alignment, which would be compiled in the middle of serving.
_ANY_ALIGNMENT = ["slots", "gates", "row_of", "norm", "low_of"]


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _steer(
    hidden,
    residual,
    out,
    slots,
    gates,
    rows,
    row_of,
    norm,
    low_a,
    low_b,
    low_of,
    hidden_token,
    hidden_entry,
    residual_token,
    residual_entry,
    out_token,
    out_entry,
    slots_token,
    slots_part,
    gates_token,
    gates_part,
    WIDTH: tl.constexpr,
    N_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_entry = at < WIDTH
    raw = tl.load(hidden + token * hidden_token + at * hidden_entry, mask=is_entry, other=0.0)
    h = raw.to(tl.float32)
    if HAS_RESIDUAL:
        beside = residual + token * residual_token + at * residual_entry
        h += tl.load(beside, mask=is_entry, other=0.0).to(tl.float32)
    steered = h
    n_changes = 0
    keeps_norm = 0
    for part in tl.static_range(N_PARTS):
        slot = tl.load(slots + token * slots_token + part * slots_part)
        gate = 1.0
        if HAS_GATES:
            gate = tl.load(gates + token * gates_token + part * gates_part)
        if (slot != 0) & (gate != 0):
            row = tl.load(row_of + slot)
            steered += gate * tl.load(rows + row * WIDTH + at, mask=is_entry, other=0.0)
            n_changes += (row != 0).to(tl.int32)
            if HAS_LOW_RANK:
                # All at once, for most slots have none, and eight loads in turn take a microsecond.
                each = tl.arange(0, RANK_BLOCK)
                pairs = tl.load(low_of + slot * RANK + each, mask=each < RANK, other=0)
                n_pairs = tl.sum((pairs != 0).to(tl.int32), axis=0)
                n_changes += n_pairs
                if n_pairs != 0:
                    mine = low_of + slot * RANK
                    steered = _without(steered, h, gate, mine, low_a, low_b, at, WIDTH, RANK)
            if HAS_NORM:
                keeps_norm |= tl.load(norm + slot).to(tl.int32)
    if (keeps_norm != 0) & (n_changes != 0):
        steered = _with_norm_of(h, steered)
    target = out + token * out_token + at * out_entry
    if IS_IN_PLACE:
        if n_changes != 0:
            tl.store(target, steered.to(out.dtype.element_ty), mask=is_entry)
            if HAS_RESIDUAL:
                zeros = tl.zeros((BLOCK,), residual.dtype.element_ty)
                beside = residual + token * residual_token + at * residual_entry
                tl.store(beside, zeros, mask=is_entry)
    elif n_changes != 0:
        tl.store(target, steered.to(out.dtype.element_ty), mask=is_entry)
    else:
        tl.store(target, raw, mask=is_entry)


@triton.jit(do_not_specialize_on_alignment=["asked"])
def _shift(
    h,
    change,
    asked,
    out,
    h_token,
    h_entry,
    change_token,
    change_entry,
    asked_token,
    out_token,
    out_entry,
    WIDTH: tl.constexpr,
    KEEPS_NORM: tl.constexpr,
    IS_ASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_entry = at < WIDTH
    x = tl.load(h + token * h_token + at * h_entry, mask=is_entry, other=0.0).to(tl.float32)
    add = tl.load(change + token * change_token + at * change_entry, mask=is_entry, other=0.0)
    shifted = x + add
    if KEEPS_NORM:
        is_kept = 1
        if IS_ASKED:
            is_kept = tl.load(asked + token * asked_token).to(tl.int32)
        if is_kept != 0:
            shifted = _with_norm_of(x, shifted)
    target = out + token * out_token + at * out_entry
    tl.store(target, shifted.to(out.dtype.element_ty), mask=is_entry)


@triton.jit(do_not_specialize_on_alignment=["asked"])
def keep_norm(
    h,
    changed,
    asked,
    out,
    h_token,
    h_entry,
    asked_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round rows `changed`, `[n_tokens, WIDTH]`, to `out`, at |h| where `asked`.

    A row that is what it was keeps its bits: its ratio is 1.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_entry = at < WIDTH
    row = tl.load(changed + token * WIDTH + at, mask=is_entry, other=0.0)
    if tl.load(asked + token * asked_token).to(tl.int32) != 0:
        x = tl.load(h + token * h_token + at * h_entry, mask=is_entry, other=0.0)
        row = _with_norm_of(x.to(tl.float32), row)
    tl.store(out + token * WIDTH + at, row.to(out.dtype.element_ty), mask=is_entry)


@triton.jit
def _without(steered, h, gate, pairs, low_a, low_b, at, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """Return `steered` less the gate's share of a (b . h) of each of a slot's pairs."""
    is_entry = at < WIDTH
    for k in range(RANK):
        pair = tl.load(pairs + k)
        if pair != 0:
            b = tl.load(low_b + pair * WIDTH + at, mask=is_entry, other=0.0)
            a = tl.load(low_a + pair * WIDTH + at, mask=is_entry, other=0.0)
            steered -= (gate * tl.sum(b * h, axis=0)) * a
    return steered


@triton.jit
def _with_norm_of(h, changed):
    """Return `changed` at |h|; a state changed to exactly zero has no direction and stays."""
    before = tl.sqrt_rn(tl.sum(h * h, axis=0))
    after = tl.sqrt_rn(tl.sum(changed * changed, axis=0))
    ratio = tl.div_rn(before, tl.where(after > 0, after, 1.0))
    return changed * tl.where(after > 0, ratio, 1.0)

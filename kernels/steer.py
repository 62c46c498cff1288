"""The steering op: one fused change of the residual stream at the output of a decoder layer.

For a token t with hidden state h and up to M bank slots, each with a gate g in [0, 1]:

    h1 = h + sum_m g_m * (u_m - A_m^T (B_m h))      additive and low-rank part
    h2 = h1 * |h| / |h1|                             if a slot that is open asks for it

u_m is the request's directions at this layer, scaled and summed when the request was admitted.
The low-rank part carries directional ablation and projection (Arditi et al., arXiv 2406.11717:
h - (h . r) r is A = B = r). Norm preservation is over the hidden dimension of the whole residual
stream, per token (GrAInS, arXiv 2507.18043; its published hook takes the norm over the sequence).

This file is the plain torch reference: the specification, the CPU path and the tests' oracle. On a
CUDA device `steer_triton.py` does the same in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.kernels.dispatch import MAX_WIDTH, runs_triton

_TINY = 1e-20  # a norm below it is none


@dataclass(frozen=True, eq=False)
class LayerBank:
    """What the op reads at one layer. Slot 0 and row 0 are the null slot and the zero row.

    Attributes:
        rows: additive rows, `[n_rows, d_model]`, float32.
        row_of: row of each slot at this layer, `[n_slots]`, int64.
        norm: whether a slot asks for norm preservation at this layer, `[n_slots]`, bool.
        low_a: left low-rank factors, `[n_low, d_model]`, float32.
        low_b: right low-rank factors, `[n_low, d_model]`, float32.
        low_of: low-rank pairs of each slot at this layer, `[n_slots, rank]`, int64; pair 0 is zero.
    """

    rows: torch.Tensor
    row_of: torch.Tensor
    norm: torch.Tensor
    low_a: torch.Tensor
    low_b: torch.Tensor
    low_of: torch.Tensor


def steer(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    *,
    bank: LayerBank,
    gates: torch.Tensor | None = None,
    has_low_rank: bool = True,
    has_norm: bool = True,
) -> torch.Tensor:
    """Return the steered hidden states of one layer.

    Args:
        hidden: residual stream, `[n_tokens, d_model]`, any floating dtype.
        slots: bank slots of each token, `[n_tokens, n_parts]`, int64; 0 leaves the token alone.
        bank: the layer's view of the bank.
        gates: weight of each slot, `[n_tokens, n_parts]`, float32 in [0, 1]; None means 1.
        has_low_rank: False skips the low-rank part when no slot here has one.
        has_norm: False skips norm preservation when no slot here asks for it.

    Returns:
        `[n_tokens, d_model]` in `hidden`'s dtype. Arithmetic is float32 with one cast at the end.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(hidden, slots, bank, gates)
    if _runs_triton(hidden):
        from trimtab.kernels import steer_triton

        return steer_triton.steer(
            hidden, slots, gates=gates, has_low_rank=has_low_rank, has_norm=has_norm, **vars(bank)
        )
    n_tokens, n_parts = slots.shape
    flat = slots.reshape(-1)
    h = hidden.float()
    # index_select and an in-place add: on a decoding batch the calls cost more than the numbers.
    change = bank.rows.index_select(0, bank.row_of.index_select(0, flat))
    change = change.view(n_tokens, n_parts, hidden.shape[1])
    if has_low_rank:
        pairs = bank.low_of[slots]  # [n_tokens, n_parts, rank]
        coefficient = torch.einsum("tmrd,td->tmr", bank.low_b[pairs], h)
        change = change - torch.einsum("tmrd,tmr->tmd", bank.low_a[pairs], coefficient)
    if gates is not None:
        change = change * gates.unsqueeze(-1)
    steered = h + (change[:, 0] if n_parts == 1 else change.sum(1))
    if has_norm:
        asked = bank.norm.index_select(0, flat).view(n_tokens, n_parts)
        if gates is not None:
            asked = asked & (gates > 0)
        before = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        after = torch.linalg.vector_norm(steered, dim=1, keepdim=True)
        # A state steered to exactly zero has no direction to stretch: it stays zero, not NaN.
        keeps = asked.any(1, keepdim=True) & (after > 0)
        steered = steered * torch.where(keeps, before / after, 1.0)
    return steered.to(hidden.dtype)


def steer_stream(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    slots: torch.Tensor,
    *,
    bank: LayerBank,
    gates: torch.Tensor | None = None,
    has_low_rank: bool = True,
    has_norm: bool = True,
) -> None:
    """Steer a stream that is kept as a sum, in place.

    The new state of a token that is changed goes whole into `hidden`, and its `residual` becomes 0,
    so that nothing is lost by subtracting. A token that no open slot changes here keeps every bit
    of both.

    Args:
        hidden: `[n_tokens, d_model]`, any floating dtype.
        residual: what has to be added to it to make the stream, of the same shape; None means 0.
        slots, bank, gates, has_low_rank, has_norm: as for `steer`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(hidden, slots, bank, gates)
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(f"steer: hidden {tuple(hidden.shape)}, residual {tuple(residual.shape)}")
    if _runs_triton(hidden):
        from trimtab.kernels import steer_triton

        steer_triton.steer(
            hidden,
            slots,
            gates=gates,
            residual=residual,
            out=hidden,
            has_low_rank=has_low_rank,
            has_norm=has_norm,
            **vars(bank),
        )
        return
    stream = hidden.float() if residual is None else hidden.float() + residual
    steered = steer(
        stream, slots, bank=bank, gates=gates, has_low_rank=has_low_rank, has_norm=has_norm
    )
    does_change = (bank.row_of[slots] != 0) | (bank.low_of[slots] != 0).any(2)
    if gates is not None:
        does_change &= gates != 0
    is_changed = does_change.any(1, keepdim=True)
    hidden.copy_(torch.where(is_changed, steered.to(hidden.dtype), hidden))
    if residual is not None:
        residual.masked_fill_(is_changed, 0)


def shift(
    h: torch.Tensor,
    change: torch.Tensor,
    *,
    keeps_norm: torch.Tensor | bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `steer`'s result where all there is to do is to add: the same numbers, fewer calls.

    Beside a model's pass on a CPU a small call costs more than its numbers, and most requests
    only add.

    Args:
        h: residual stream, `[n_tokens, d_model]`, float32; not changed.
        change: what each token gets, `[n_tokens, d_model]`, float32.
        keeps_norm: whether |h| is restored, `[n_tokens, 1]`, bool, or one for all.
        out: where to put it, `[n_tokens, d_model]`, any floating dtype.
    """
    if _runs_triton(h, change):
        from trimtab.kernels import steer_triton

        return steer_triton.shift(h, change, keeps_norm=keeps_norm, out=out)
    if keeps_norm is False:
        return torch.add(h, change, out=out)
    shifted = h + change
    before = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    # A state shifted to exactly zero has no direction to stretch: it stays zero, not NaN.
    after = torch.linalg.vector_norm(shifted, dim=1, keepdim=True).clamp_min(_TINY)
    ratio = before / after
    if isinstance(keeps_norm, torch.Tensor):
        ratio = torch.where(keeps_norm, ratio, 1.0)
    return torch.mul(shifted, ratio, out=out)


def _runs_triton(*tensors: torch.Tensor) -> bool:
    return runs_triton(*tensors) and tensors[0].shape[1] <= MAX_WIDTH


def _check(
    hidden: torch.Tensor, slots: torch.Tensor, bank: LayerBank, gates: torch.Tensor | None
) -> None:
    if hidden.ndim != 2 or slots.ndim != 2 or slots.shape[0] != hidden.shape[0]:
        raise ValueError(f"steer: hidden {tuple(hidden.shape)} and slots {tuple(slots.shape)}")
    if bank.rows.shape[1] != hidden.shape[1]:
        raise ValueError(f"steer: width {hidden.shape[1]}, bank width {bank.rows.shape[1]}")
    if gates is not None and gates.shape != slots.shape:
        raise ValueError(f"steer: gates {tuple(gates.shape)} and slots {tuple(slots.shape)}")

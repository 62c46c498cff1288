"""The steering op and guidance by themselves: are they right on this device, and how long."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from trimtab.kernels import Classifier, Goals, LayerBank, guide, steer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N_SLOTS = 256
N_LABELS = 16
KINDS = ("added", "normed", "gated", "low rank")


def correct(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Return each case's largest error relative to the float32 reference's RMS.

    Inputs are the device's own, so that only the op's arithmetic differs; a token without a slot,
    or with step sizes of 0, must keep every bit.
    """
    cases = []
    width = 32 if tiny else 4096
    for dtype, n_tokens in itertools.product(DTYPES, (1, 7, 64, 257)):
        for kind in KINDS:
            hidden, slots, bank, more = _steering(n_tokens, width, kind)
            hidden = hidden.to(dtype)
            wanted = steer(hidden.float(), slots, bank=bank, **more)
            found = steer(
                hidden.to(device),
                slots.to(device),
                bank=_bank_to(bank, device),
                **_to(more, device),
            )
            still = (slots == 0).all(1)
            cases.append(_case(f"steer {kind}", dtype, n_tokens, found, wanted, hidden, still))
        for loss in ("logits", "softmax", "sigmoid"):
            hidden, network, goals = _guidance(n_tokens, width)
            hidden = hidden.to(dtype)
            wanted = guide(hidden.float(), network, goals, loss=loss)
            found = guide(
                hidden.to(device), network.to(device), _goals_to(goals, device), loss=loss
            )
            still = (goals.sizes == 0).all(1)
            cases.append(_case(f"guide {loss}", dtype, n_tokens, found, wanted, hidden, still))
    return cases


def _case(
    name: str,
    dtype: torch.dtype,
    n_tokens: int,
    found: torch.Tensor,
    wanted: torch.Tensor,
    hidden: torch.Tensor,
    still: torch.Tensor,
) -> dict[str, Any]:
    found = found.cpu()
    rms = wanted.square().mean().sqrt()
    error = float((found.float() - wanted).abs().max() / rms)
    # One rounding to the dtype of values up to about five times their RMS; more is an error.
    bound = 1e-4 if dtype is torch.float32 else 8 * float(torch.finfo(dtype).eps)
    return {
        "op": name,
        "dtype": str(dtype).removeprefix("torch."),
        "n_tokens": n_tokens,
        "error": error,
        "bound": bound,
        "still_tokens_keep_bits": bool(torch.equal(found[still], hidden[still])),
        "ok": error <= bound and bool(torch.equal(found[still], hidden[still])),
    }


def timed(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Return the median milliseconds of one layer's op, every token with a plan of its own."""
    rows = []
    widths = (32,) if tiny else (1536, 4096)
    counts = (1, 8) if tiny else (1, 8, 32, 64, 256, 1024, 4096)
    for width, n_tokens in itertools.product(widths, counts):
        for kind in KINDS:
            hidden, slots, bank, more = _steering(n_tokens, width, kind)
            x, at = hidden.to(device, torch.bfloat16), slots.to(device)
            there, options = _bank_to(bank, device), _to(more, device)
            ms = _median_ms(
                lambda x=x, at=at, there=there, o=options: steer(x, at, bank=there, **o), device
            )
            rows.append({"op": f"steer {kind}", "width": width, "n_tokens": n_tokens, "ms": ms})
        hidden, network, goals = _guidance(n_tokens, width)
        x, net = hidden.to(device, torch.bfloat16), network.to(device)
        aims = _goals_to(goals, device)
        ms = _median_ms(
            lambda x=x, net=net, aims=aims: guide(
                x, net, aims, loss="softmax", has_rival=False, has_until=False, has_norm=False
            ),
            device,
        )
        rows.append({"op": "guide, 3 steps", "width": width, "n_tokens": n_tokens, "ms": ms})
    return rows


def _median_ms(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return a call's cost on an idle device, many in a row, and of that the host's own part."""
    repeats = 50 if device.type == "cuda" else 10
    for _ in range(10):
        call()
    if device.type != "cuda":
        return {"wall": _wall_ms(call, repeats)}
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    alone = statistics.median(begin.elapsed_time(end) for begin, end in events)
    # Many in a row: what a call costs where the queue is never empty.
    at = time.perf_counter()
    for _ in range(repeats):
        call()
    launched = time.perf_counter() - at
    torch.cuda.synchronize()
    whole = time.perf_counter() - at
    return {"alone": alone, "in_a_row": 1e3 * whole / repeats, "host": 1e3 * launched / repeats}


def _wall_ms(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        at = time.perf_counter()
        call()
        times.append(time.perf_counter() - at)
    return 1e3 * statistics.median(times)


# --- inputs


def _steering(
    n_tokens: int, width: int, kind: str
) -> tuple[torch.Tensor, torch.Tensor, LayerBank, dict[str, Any]]:
    generator = torch.Generator().manual_seed(n_tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, low = draw(N_SLOTS + 1, width), draw(2, N_SLOTS + 1, width) / width**0.5
    rows[0], low[:, 0] = 0, 0
    numbers = torch.arange(N_SLOTS + 1)
    has_low = kind == "low rank"
    bank = LayerBank(
        rows=rows,
        row_of=numbers,
        norm=numbers % 2 == 1 if kind == "normed" else torch.zeros(N_SLOTS + 1, dtype=torch.bool),
        low_a=low[0],
        low_b=low[1],
        low_of=(numbers.unsqueeze(1) if has_low else torch.zeros(N_SLOTS + 1, 1)).long(),
    )
    n_parts = 2 if kind == "gated" else 1
    slots = torch.randint(1, N_SLOTS + 1, (n_tokens, n_parts), generator=generator)
    slots[::5] = 0
    more: dict[str, Any] = {"has_low_rank": has_low, "has_norm": kind == "normed"}
    if kind == "gated":
        more["gates"] = torch.randint(0, 2, slots.shape, generator=generator).float()
    return 4 * draw(n_tokens, width), slots, bank, more


def _guidance(n_tokens: int, width: int) -> tuple[torch.Tensor, Classifier, Goals]:
    generator = torch.Generator().manual_seed(n_tokens)
    sizes = [width, 128, 128, N_LABELS]
    network = Classifier.of(
        [
            (torch.randn(m, n, generator=generator) / n**0.5, torch.zeros(m))
            for n, m in itertools.pairwise(sizes)
        ],
        is_exclusive=True,
    )
    labels = torch.arange(N_LABELS)
    aims = torch.arange(n_tokens).unsqueeze(1)
    steps = torch.full((n_tokens, 3), 0.5)
    steps[::5] = 0
    goals = Goals(
        toward=labels == aims % N_LABELS,
        away=labels == (aims + 1) % N_LABELS,
        sizes=steps,
        picks_rival=torch.zeros(n_tokens, dtype=torch.bool),
        until=torch.full((n_tokens,), 2.0),
        keeps_norm=torch.zeros(n_tokens, dtype=torch.bool),
    )
    return 4 * torch.randn(n_tokens, width, generator=generator), network, goals


def _bank_to(bank: LayerBank, device: torch.device) -> LayerBank:
    return replace(bank, **{f.name: getattr(bank, f.name).to(device) for f in fields(bank)})


def _goals_to(goals: Goals, device: torch.device) -> Goals:
    return replace(goals, **{f.name: getattr(goals, f.name).to(device) for f in fields(goals)})


def _to(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}

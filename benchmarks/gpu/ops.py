"""The steering op and guidance by themselves: are they right on this device, and how long.

On a GPU both implementations run: Triton's kernels, which serving takes there, and plain torch. On
a CPU the kernels run in Triton's interpreter if TRITON_INTERPRET=1 is set and it is installed; its
numbers are a GPU's only with `tests/triton_interpreter.py`, so there they are float32's alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from trimtab.kernels import Classifier, Goals, LayerBank, guide, steer, steer_stream
from trimtab.kernels.dispatch import Implementation, using

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N_SLOTS = 256
N_LABELS = 16
KINDS = ("added", "normed", "gated", "low rank")
GRAPH_LAYERS = 32


def implementations(device: torch.device) -> list[Implementation]:
    """Return what can run on a device, the one that serves there first."""
    if device.type == "cuda":
        return ["triton", "torch"]
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_triton = is_interpreted and importlib.util.find_spec("triton") is not None
    return ["torch", "triton"] if has_triton else ["torch"]


def correct(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Return each case's largest error relative to the float32 reference's RMS.

    Inputs are the device's own, so that only the op's arithmetic differs; a token without a slot,
    or with step sizes of 0, must keep every bit.
    """
    cases = []
    for name in implementations(device):
        with using(name):
            cases += _correct(device, name, tiny=tiny)
    return cases + ([] if device.type != "cuda" else [_replayed(device)])


def _correct(device: torch.device, name: Implementation, *, tiny: bool) -> list[dict[str, Any]]:
    cases = []
    width = 32 if tiny else 4096
    for dtype, n_tokens in itertools.product(DTYPES, (1, 7, 33) if tiny else (1, 7, 64, 257)):
        for kind in KINDS:
            hidden, slots, bank, more = _steering(n_tokens, width, kind)
            hidden = hidden.to(dtype)
            with using("torch"):
                wanted = steer(hidden.float(), slots, bank=bank, **more)
            found = steer(
                hidden.to(device),
                slots.to(device),
                bank=_bank_to(bank, device),
                **_to(more, device),
            )
            still = (slots == 0).all(1)
            what = f"steer {kind}", name, dtype
            cases.append(_case(what, n_tokens, found, wanted, hidden, still))
        for loss in ("logits", "softmax", "sigmoid"):
            hidden, network, goals = _guidance(n_tokens, width)
            hidden = hidden.to(dtype)
            with using("torch"):
                wanted = guide(hidden.float(), network, goals, loss=loss)
            found = guide(
                hidden.to(device), network.to(device), _goals_to(goals, device), loss=loss
            )
            still = (goals.sizes == 0).all(1)
            what = f"guide {loss}", name, dtype
            cases.append(_case(what, n_tokens, found, wanted, hidden, still))
    return cases


def _replayed(device: torch.device) -> dict[str, Any]:
    """Return whether a captured pass follows what the buffers hold when it is replayed."""
    hidden, slots, bank, _ = _steering(64, 4096, "normed")
    there, at = _bank_to(bank, device), slots.to(device)
    states, residual = hidden.to(device), hidden.flip(0).to(device)
    with using("triton"):
        graph = _captured(lambda: steer_stream(states, residual, at, bank=there))
        # Another batch and another request in the same buffers.
        at.copy_(slots.flip(0).to(device))
        there.rows.mul_(-2)
        states.copy_(hidden.to(device))
        residual.copy_(hidden.flip(0).to(device))
        graph.replay()
    wanted, beside = hidden.clone(), hidden.flip(0).contiguous()
    with using("torch"):
        changed = replace(bank, rows=-2 * bank.rows)
        steer_stream(wanted, beside, slots.flip(0), bank=changed)
    still = (slots.flip(0) == 0).all(1)
    what = "steer_stream, replayed", "triton", torch.float32
    return _case(what, 64, states, wanted, hidden, still)


def _case(
    what: tuple[str, str, torch.dtype],
    n_tokens: int,
    found: torch.Tensor,
    wanted: torch.Tensor,
    hidden: torch.Tensor,
    still: torch.Tensor,
) -> dict[str, Any]:
    name, implementation, dtype = what
    found = found.cpu()
    rms = wanted.square().mean().sqrt()
    error = float((found.float() - wanted).abs().max() / rms)
    # One rounding to the dtype of values up to about five times their RMS; more is an error.
    bound = 1e-4 if dtype is torch.float32 else 8 * float(torch.finfo(dtype).eps)
    return {
        "op": name,
        "implementation": implementation,
        "dtype": str(dtype).removeprefix("torch."),
        "n_tokens": n_tokens,
        "error": error,
        "bound": bound,
        "still_tokens_keep_bits": bool(torch.equal(found[still], hidden[still])),
        "ok": error <= bound and bool(torch.equal(found[still], hidden[still])),
    }


def timed(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """Return what one layer's op takes, every token with a plan of its own.

    `ms`: a call by itself, median. `us_a_layer`: in a CUDA graph of 32 layers in a row, in place on
    a stream of two halves; on a CPU the same calls without a graph.
    """
    rows = []
    for name in implementations(device):
        with using(name):
            rows += [{"implementation": name, **row} for row in _timed(device, tiny=tiny)]
            rows += [{"implementation": name, **row} for row in _layers(device, tiny=tiny)]
    return rows


def _timed(device: torch.device, *, tiny: bool) -> Iterator[dict[str, Any]]:
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
            yield {"op": f"steer {kind}", "width": width, "n_tokens": n_tokens, "ms": ms}
        hidden, network, goals = _guidance(n_tokens, width)
        x, net = hidden.to(device, torch.bfloat16), network.to(device)
        aims = _goals_to(goals, device)
        ms = _median_ms(
            lambda x=x, net=net, aims=aims: guide(
                x, net, aims, loss="softmax", has_rival=False, has_until=False, has_norm=False
            ),
            device,
        )
        yield {"op": "guide, 3 steps", "width": width, "n_tokens": n_tokens, "ms": ms}


def _layers(device: torch.device, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the op's cost a layer where nothing is left of the host's: 256 tokens are the goal."""
    width, n_layers, n_slots = (32, 2, 8) if tiny else (4096, GRAPH_LAYERS, N_SLOTS)
    generator = torch.Generator().manual_seed(0)
    # A row of its own for every slot and layer, as a full bank has: 134 MB, more than a cache.
    rows = torch.randn(n_layers * n_slots + 1, width, generator=generator)
    row_of = torch.arange(1, n_layers * n_slots + 1).view(n_layers, n_slots)
    row_of = torch.cat([torch.zeros(n_layers, 1, dtype=torch.int64), row_of], dim=1)
    empty = torch.zeros(n_slots + 1, 8, dtype=torch.int64)
    for is_normed, n_tokens in itertools.product((False, True), (2,) if tiny else (16, 64, 256)):
        whole = LayerBank(
            rows=rows,
            row_of=row_of,
            norm=torch.full((n_slots + 1,), is_normed),
            low_a=torch.zeros(1, width),
            low_b=torch.zeros(1, width),
            low_of=empty,
        )
        there = _bank_to(whole, device)
        banks = [replace(there, row_of=there.row_of[n]) for n in range(n_layers)]
        slots = torch.zeros(n_tokens, 4, dtype=torch.int64)
        slots[:, 0] = 1 + torch.arange(n_tokens) % n_slots
        at = slots.to(device)
        hidden = torch.randn(n_tokens, width, generator=generator).to(device, torch.bfloat16)
        residual = torch.zeros_like(hidden)

        def run(banks=banks, hidden=hidden, residual=residual, at=at) -> None:
            for bank in banks:
                steer_stream(hidden, residual, at, bank=bank)

        call = run if device.type != "cuda" else _captured(run).replay
        ms = _median_ms(call, device)
        yield {
            "op": f"{n_layers} layers{', normed' if is_normed else ''}",
            "width": width,
            "n_tokens": n_tokens,
            "us_a_layer": 1e3 * ms.get("in_a_row", ms.get("wall", 0.0)) / n_layers,
        }


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a call as a graph; it runs once before, for kernels are compiled by then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


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

"""What steering costs the host in one forward pass, without a model.

    PYTHONSAFEPATH=1 python benchmarks/steer_step_cost.py

A decoding pass has one token a request. For 1, 32 and 256 requests, each steered its own way, it
prints the median of: planning the pass, planning it again for the same requests, the layers' own
work on the CPU, and closing it. Also how many bytes a request's plan is on its way to the workers,
and what the bank takes, for the shapes of three models.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from trimtab.kernels import Classifier
from trimtab.serving.engines.vllm.plan_wire import packed_network, packed_request
from trimtab.steering.bank import Bank
from trimtab.steering.plan import MAX_PARTS, Gate, Guide, LayerTerm, Part, Plan, Reader, plan_of
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.step_planner import StepPlanner
from trimtab.steering.window import Window

SHAPES = {"SmolLM2-135M": (30, 576), "Llama-3.1-8B": (32, 4096), "Llama-3.1-70B": (80, 8192)}
UNITS, N_LABELS = 256, 6


def reader(hidden_size: int, *, layer: int) -> Reader:
    """Return a classifier of the bundled tones' shape."""
    sizes = [(UNITS, hidden_size), (UNITS, UNITS), (N_LABELS, UNITS)]
    layers = [(torch.randn(shape) / shape[1] ** 0.5, torch.zeros(shape[0])) for shape in sizes]
    labels = tuple(f"label {i}" for i in range(N_LABELS))
    network = Classifier.of(layers, is_exclusive=True)
    return Reader("tone", layer, network, labels, f"{layer:064x}")


def plans_of(kind: str, n: int, *, n_layers: int, hidden_size: int) -> list[Plan]:
    """Return `n` different plans of a kind."""
    middle = n_layers // 2
    shared = reader(hidden_size, layer=middle)

    def plan(i: int) -> Plan:
        if kind == "guidance":
            guide = Guide(shared, (i % N_LABELS,), (), (0.5 + i / 1000,) * 3)
            return plan_of({middle: LayerTerm(guides=(guide,))})
        layers = range(n_layers) if kind == "all layers, norm kept" else (middle,)
        terms = {
            n: LayerTerm(add=torch.randn(hidden_size), normalize=len(layers) > 1) for n in layers
        }
        if kind != "token gate":
            return plan_of(terms)
        gate = Gate("tone/label 0", shared, 0, 0.2, True, False)
        return Plan((Part.of(Window(), gate, terms),), f"{i}", None)

    return [plan(i) for i in range(n)]


def median_ms(work: Callable[[], Any], *, repeats: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(kind: str, n: int, *, n_layers: int, hidden_size: int, repeats: int) -> list[float]:
    """Return medians in ms: planning, planning again, the layers, closing."""
    bank = Bank(
        n_layers=n_layers, hidden_size=hidden_size, max_slots=MAX_PARTS * n, max_rows=n * n_layers
    )
    spans = []
    for plan in plans_of(kind, n, n_layers=n_layers, hidden_size=hidden_size):
        lease = bank.acquire(plan)
        assert lease is not None
        spans.append(Span(1, 40, SteeredRequest(lease, 30)))
    planner = StepPlanner(bank)
    hidden = torch.randn(n, hidden_size)
    step = SteerStep(bank, spans)

    def all_layers() -> None:
        for layer in sorted(step.layers):
            step.apply(layer, hidden)

    with torch.inference_mode():
        planner.step(spans)
        all_layers()
        return [
            median_ms(lambda: SteerStep(bank, spans), repeats=repeats),
            median_ms(lambda: planner.step(spans), repeats=repeats),
            median_ms(all_layers, repeats=repeats),
            median_ms(step.finish, repeats=repeats),
        ]


def size_of(value: Any) -> int:
    """Return the bytes of a plain value in msgpack, to within a few for each list."""
    if isinstance(value, dict):
        return sum(size_of(key) + size_of(entry) for key, entry in value.items()) + 3
    if isinstance(value, list | tuple):
        return sum(map(size_of, value)) + 3
    if isinstance(value, bytes | str):
        return len(value) + (5 if len(value) > 255 else 2)
    return 9 if isinstance(value, float) else 1 + 4 * (not isinstance(value, bool | None))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    n_layers, hidden_size = SHAPES[options.shape]
    print(f"{options.shape}, {torch.get_num_threads()} threads, ms a pass")
    print(f"{'':24}{'requests':>9}{'plan':>9}{'again':>9}{'layers':>9}{'close':>9}")
    for kind in ("one layer", "all layers, norm kept", "guidance", "token gate"):
        for n in options.requests:
            times = measure(
                kind, n, n_layers=n_layers, hidden_size=hidden_size, repeats=options.repeats
            )
            print(f"{kind:24}{n:9}" + "".join(f"{ms:9.3f}" for ms in times))
    print("\nbytes: a plan on the wire, a network on the wire, the bank's rows a request")
    for name, (n_layers, hidden_size) in SHAPES.items():
        kinds = ("one layer", "all layers, norm kept", "guidance")
        made = [plans_of(k, 1, n_layers=n_layers, hidden_size=hidden_size)[0] for k in kinds]
        plans = " ".join(f"{size_of(packed_request(plan)):>9}" for plan in made)
        network = size_of(packed_network(reader(hidden_size, layer=1).classifier))
        print(f"{name:24}{plans} {network:>9} {4 * n_layers * hidden_size:>9}")


if __name__ == "__main__":
    main()

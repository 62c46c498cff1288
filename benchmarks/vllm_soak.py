"""A soak of the HTTP app on the vLLM engine: many clients, every answer steered its own way.

    python benchmarks/vllm_soak.py --minutes 30
    python benchmarks/vllm_soak.py --minutes 1.5 --clients 8      # a trial; less than 200 compared

SmolLM2-135M in float32, eager, eight sequences at once and so little room for their keys and values
that sequences are preempted and run again. Clients store, replace and delete vectors, ask for chats
plain and steered (vectors at any scale, ablation, guidance, gates, windows, two choices), streamed
and not, and leave in the middle of a stream. It fails, with exit code 1, unless

- every answer has a status it may have, a stream its end, a steered answer its receipt;
- greedy answers, drawn from all over the run, are what transformers makes of the same prompt under
  the plan that was compiled for the request: alone, one pass over prompt and answer, and each token
  the likeliest. A token less likely by at most 0.001 (log-probability) is a near tie, and so is one
  that the reference itself chooses after a disturbance of 1e-5 in the plan: gates switch and ReLUs
  bend where two sums may fall on either side;
- at the end nobody holds a request, a slot or a place, in the app or in the worker;
- the memory of neither process grew by more than 2 MiB a minute plus 32 MiB, from the time a third
  of the run was over; the slope is told.

One JSON summary goes to stdout, what happens meanwhile to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn
from soak_reference import Finished, compared
from steered_arms import TOPICS

from trimtab.serving.app import create_app
from trimtab.serving.engines.base import Delta, FinishReason, Request
from trimtab.serving.engines.vllm.engine import VllmConfig, VllmEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.classifier import to_bytes as classifier_bytes
from trimtab.steering.store import Store
from trimtab.steering.vector import VectorArtifact
from trimtab.steering.vector import to_bytes as vector_bytes

MODEL = "smollm2"
LABELS = ("casual", "expert", "concise", "warm")
VECTORS = tuple(f"v{i}" for i in range(6))
KEPT = 400  # answers kept for the comparison, evenly over the run
TEXTS = "Write a story about {}.", "Why do people like {}? Explain.", "List ten words about {}."


class Recorder:
    """The engine, with a memory for what greedy requests asked and got."""

    def __init__(self, engine: VllmEngine, *, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.kept: list[Finished] = []
        self.n_finished = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._engine.start()

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        streams = self._engine.generate(*requests)
        return [self._watched(*pair) for pair in zip(requests, streams, strict=True)]

    async def _watched(self, request: Request, stream: Any) -> AsyncIterator[Delta]:
        ids: list[int] = []
        try:
            async for delta in stream:
                ids += delta.token_ids
                if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self._keep(request, ids)
                yield delta
        finally:
            await stream.aclose()

    def _keep(self, request: Request, ids: list[int]) -> None:
        if request.sampling.temperature != 0.0:
            return
        self.n_finished += 1
        made = Finished(request.prompt_ids, tuple(ids), request.plan)
        if len(self.kept) < KEPT:
            self.kept.append(made)
        elif (place := self._random.randrange(self.n_finished)) < KEPT:
            self.kept[place] = made

    def ask(self, method: str) -> list[dict[str, int]]:
        """Call a method of the worker."""
        assert self.loop is not None
        asked = self._engine._llm.collective_rpc(method)
        return asyncio.run_coroutine_threadsafe(asked, self.loop).result(timeout=30)


@dataclass
class Tally:
    """What the clients saw."""

    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    def fault(self, what: str) -> None:
        with self.lock:
            self.seen["faults"] += 1
            if len(self.faults) < 20:
                self.faults.append(what[:500])


class Client:
    """One client, doing something at random until time is up.

    Args:
        url: of the server.
        tally: where it tells what it saw.
        seed: of its choices.
        norms: typical |h| of each layer.
        ref: the served model.
    """

    def __init__(self, url: str, tally: Tally, *, seed: int, norms: list[float], ref: Any) -> None:
        self.http = httpx.Client(base_url=url, timeout=300)
        self.tally = tally
        self.random = random.Random(seed)
        self.norms = norms
        self.ref = ref
        self._generator = __import__("torch").Generator().manual_seed(seed)

    def until(self, end: float) -> None:
        """Act until `end`, by `time.monotonic`."""
        with self.http:
            while time.monotonic() < end:
                act = self.random.choices(
                    (self.chat, self.stream, self.put_vector, self.delete_vector), (16, 16, 5, 1)
                )[0]
                try:
                    act()
                except Exception as error:
                    self.tally.fault(f"{act.__name__}: {type(error).__name__}: {error}")

    # --- vectors

    def put_vector(self, name: str | None = None) -> None:
        """Store a new vector under a name that may be taken."""
        import torch

        n_layers, width = len(self.norms), self.ref.hidden_size
        layers = tuple(sorted(self.random.sample(range(n_layers), self.random.randint(1, 8))))
        rows = torch.randn(len(layers), width, generator=self._generator)
        sizes = torch.tensor([0.1 * self.norms[layer] for layer in layers]).unsqueeze(1)
        made = VectorArtifact(
            id="soak",
            model=self.ref,
            layers=layers,
            directions=rows / rows.norm(dim=1, keepdim=True) * sizes,
            default_layers=layers,
            method="random",
            normalize=self.random.random() < 0.3,
        )
        name = name or self.random.choice(VECTORS)
        answer = self.http.put(f"/v1/steering/vectors/{name}", content=vector_bytes(made))
        self._expect(answer, (200, 201), "put")

    def delete_vector(self) -> None:
        """Delete a vector that may not be there."""
        name = self.random.choice(VECTORS)
        self._expect(self.http.delete(f"/v1/steering/vectors/{name}"), (200, 404), "delete")

    # --- chats

    def chat(self) -> None:
        """Ask, and wait for the whole answer."""
        body = self._body()
        answer = self.http.post("/v1/chat/completions", json=body)
        if self._expect(answer, (200, 404, 429), "chat") != 200:
            return
        found = answer.json()
        if len(found["choices"]) != body.get("n", 1):
            self.tally.fault(f"{len(found['choices'])} choices of {body.get('n', 1)}")
        texts = {choice["message"]["content"] for choice in found["choices"]}
        if body["temperature"] == 0 and len(texts) != 1:
            self.tally.seen["greedy choices that differ"] += 1
        if "steering" in body and not found.get("steering"):
            self.tally.fault(f"no receipt: {json.dumps(found)[:300]}")

    def stream(self) -> None:
        """Ask for a stream, and perhaps leave before its end."""
        body = self._body() | {"stream": True}
        leaves_after = self.random.randint(0, 20) if self.random.random() < 0.3 else None
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                self._expect(answer, (404, 429), "stream")
                return
            n, last, events = 0, "", 0
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                events += 1
                last = line.removeprefix("data: ")
                if '"error"' in last[:12]:
                    self.tally.fault(f"stream: {last}")
                n += '"content"' in last
                if leaves_after is not None and n > leaves_after:
                    self.tally.saw("left in mid-stream")
                    return
        self.tally.saw("stream 200")
        if last != "[DONE]":
            self.tally.fault(f"a stream of {events} events ended with {last[:200]!r}")

    def _body(self) -> dict[str, Any]:
        text = self.random.choice(TEXTS).format(self.random.choice(TOPICS))
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.random.randint(4, 96),
            "temperature": 0 if self.random.random() < 0.7 else 0.8,
        }
        if self.random.random() < 0.15:
            body["n"] = 2
        if self.random.random() < 0.75:
            body["steering"] = self._steering()
        return body

    def _steering(self) -> dict[str, Any]:
        spec: dict[str, Any] = {}
        kinds = self.random.sample(("vectors", "ablate", "guidance"), self.random.choice((1, 1, 2)))
        if "vectors" in kinds:
            names = self.random.sample(VECTORS, self.random.randint(1, 3))
            # Terms at one layer must agree about the norm, whatever their vectors say.
            normalize = self.random.random() < 0.3
            spec["vectors"] = [self._vector(name) | {"normalize": normalize} for name in names]
        if "ablate" in kinds:
            spec["ablate"] = [{"id": self.random.choice(VECTORS)}]
        if "guidance" in kinds:
            spec["guidance"] = [self._guidance()]
        if self.random.random() < 0.3:
            spec["when"] = {
                "probe": f"tone/{self.random.choice(LABELS)}",
                self.random.choice(("above", "below")): round(self.random.uniform(0.1, 0.5), 2),
                "per": self.random.choice(("token", "prompt")),
                "layer": 0,
            }
        return spec

    def _vector(self, name: str) -> dict[str, Any]:
        term: dict[str, Any] = {"id": name, "scale": round(self.random.uniform(-2, 2), 3)}
        if self.random.random() < 0.3:
            windows: tuple[dict[str, Any], ...] = (
                {"prompt": False},
                {"generation": False},
                {"prompt": False, "first": 8},
                {"prompt": False, "after": 4},
            )
            term["apply"] = self.random.choice(windows)
        return term

    def _guidance(self) -> dict[str, Any]:
        target, avoid = self.random.sample(LABELS, 2)
        return {
            "classifier": "tone",
            "target": [target],
            "avoid": [avoid] if self.random.random() < 0.5 else [],
            "dose": round(self.random.uniform(0.02, 0.2), 3),
            "over_dose": True,
            "steps": self.random.randint(1, 3),
            "loss": self.random.choice(("logits", "softmax")),
            "normalize": self.random.random() < 0.3,
        }

    def _expect(self, answer: httpx.Response, statuses: tuple[int, ...], what: str) -> int:
        self.tally.saw(f"{what} {answer.status_code}")
        if answer.status_code not in statuses:
            self.tally.fault(f"{what}: {answer.status_code} {answer.text[:300]}")
        return answer.status_code


def _classifier(ref: Any, norms: list[float]) -> bytes:
    """Return a classifier of random weights at layers 0 (for gates) and in the middle."""
    import torch

    generator = torch.Generator().manual_seed(1)
    layers = (0, len(norms) // 2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator) / shape[-1] ** 0.5

    # States of length |h| give the first layer values of about 1.
    lengths = torch.tensor([norms[layer] for layer in layers]).view(2, 1, 1)
    made = ClassifierArtifact(
        id="tone",
        model=ref,
        layers=layers,
        labels=LABELS,
        is_exclusive=True,
        w_in=draw(64, ref.hidden_size) * ref.hidden_size**0.5 / lengths,
        b_in=draw(64),
        w_mid=draw(64, 64) * 2**0.5,
        b_mid=draw(64),
        w_out=draw(len(LABELS), 64) * 2,
        b_out=draw(len(LABELS)),
        default_layers=layers[1:],
        probe_layer=layers[0],
    )
    return classifier_bytes(made)


class Memory:
    """Resident memory of this process and its children, now and then."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.samples: list[tuple[float, float, float]] = []  # minutes, MiB here, MiB in children

    def sample(self) -> None:
        me = psutil.Process()
        children = sum(child.memory_info().rss for child in me.children(recursive=True))
        minutes = (time.monotonic() - self._begun) / 60
        self.samples.append((minutes, me.memory_info().rss / 2**20, children / 2**20))

    def growth(self) -> dict[str, dict[str, float | bool]]:
        """Return each side's slope and rise after a third of the run, and whether that is flat."""
        late = [one for one in self.samples if one[0] >= self.samples[-1][0] / 3]
        minutes = late[-1][0] - late[0][0]
        bound = 32 + 2 * minutes
        found: dict[str, dict[str, float | bool]] = {}
        for column, name in ((1, "server"), (2, "engine")):
            slope, _ = statistics.linear_regression(
                [one[0] for one in late], [one[column] for one in late]
            )
            rise = slope * minutes
            found[name] = {
                "last_mib": round(late[-1][column], 1),
                "slope_mib_a_minute": round(slope, 2),
                "rise_mib": round(rise, 1),
                "bound_mib": round(bound, 1),
                "is_flat": rise <= bound,
            }
        return found


def _preemptions() -> float:
    """Return how often vLLM says that it preempted."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "vllm:num_preemptions"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def _drained(recorder: Recorder, client: Client) -> dict[str, Any]:
    """Wait until nobody holds anything, and return what is held."""
    held: dict[str, Any] = {}
    for _ in range(60):
        client.http.post("/v1/chat/completions", json=client._body() | {"max_tokens": 1, "n": 1})
        worker = recorder.ask("trimtab_stats")[0]
        app = recorder.stats()
        held = {
            "worker_requests": worker["requests"],
            "worker_slots": worker["slots_used"],
            "app_running": app.running,
            "app_waiting": app.waiting,
            "app_slots": app.slots_used,
        }
        if not any(held.values()):
            break
        time.sleep(0.5)
    return held | {"worker": worker}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, default=250, help="greedy answers to compare")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of 32 tokens for all")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": args.blocks,
    }
    engine = VllmEngine(MODEL, config=VllmConfig(max_queue=64, options=options))
    recorder = Recorder(engine, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        summary = _soak(recorder, Store(Path(folder)), args)
    # vLLM is gone: its memory is free for the reference.
    kept = recorder.kept
    random.Random(args.seed).shuffle(kept)
    verdict = compared(MODEL, kept[: args.compare])
    summary["compared"] = verdict
    is_long = args.minutes >= 10
    ok = (
        not summary["faults"]
        and not any(v for k, v in summary["held"].items() if k != "worker")
        and all(side["is_flat"] for side in summary["memory"].values())
        and not verdict["wrong"]
        and (verdict["answers"] >= min(200, args.compare) or not is_long)
        and (summary["preemptions"] > 0 or not is_long)
    )
    print(json.dumps(summary | {"ok": ok}))
    sys.exit(0 if ok else 1)


def _soak(recorder: Recorder, store: Store, args: argparse.Namespace) -> dict[str, Any]:
    app = create_app(recorder, store, settings=ServerSettings(served_model_name=MODEL))  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        _wait_ready(url)
        return _load(recorder, url, args)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()


def _wait_ready(url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("the server was not ready after five minutes")


def _load(recorder: Recorder, url: str, args: argparse.Namespace) -> dict[str, Any]:
    norms, ref = recorder.info.hidden_norms.tolist(), recorder.info.model
    tally = Tally()
    clients = [
        Client(url, tally, seed=1000 * args.seed + i, norms=norms, ref=ref)
        for i in range(args.clients + 1)
    ]
    last = clients.pop()
    answer = last.http.put("/v1/steering/classifiers/tone", content=_classifier(ref, norms))
    answer.raise_for_status()
    for name in VECTORS:
        last.put_vector(name)
    memory, begun = Memory(), time.monotonic()
    end = begun + 60 * args.minutes
    threads = [threading.Thread(target=c.until, args=(end,), daemon=True) for c in clients]
    for one in threads:
        one.start()
    told = 0.0
    while time.monotonic() < end:
        time.sleep(2)
        memory.sample()
        if time.monotonic() > told + 30:
            told = time.monotonic()
            minutes = (told - begun) / 60
            print(f"{minutes:.1f} min: {dict(tally.seen)}", file=sys.stderr, flush=True)
    for one in threads:
        one.join(timeout=300)
        if one.is_alive():
            tally.fault("a client hangs")
    summary = {
        "minutes": args.minutes,
        "clients": args.clients,
        "seen": dict(tally.seen),
        "faults": tally.faults,
        "greedy_finished": recorder.n_finished,
        "preemptions": _preemptions(),
        "held": _drained(recorder, last),
        "memory": memory.growth(),
    }
    last.http.close()
    return summary


if __name__ == "__main__":
    main()

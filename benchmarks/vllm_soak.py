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
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from soak_checks import Memory, Recorder, drained, preemptions
from soak_clients import MODEL, VECTORS, Client, Tally, random_classifier
from soak_reference import compared

from trimtab.serving.app import create_app
from trimtab.serving.engines.vllm.engine import VllmConfig, VllmEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.store import Store


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
    answer = last.http.put("/v1/steering/classifiers/tone", content=random_classifier(ref, norms))
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
        "preemptions": preemptions(),
        "held": drained(recorder, last),
        "memory": memory.growth(),
    }
    last.http.close()
    return summary


if __name__ == "__main__":
    main()

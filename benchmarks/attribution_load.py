"""What chats feel while others attribute: eight streams beside twenty attributions, through HTTP.

    python benchmarks/attribution_load.py                # SmolLM2-135M, about two minutes
    python benchmarks/attribution_load.py --method integrated_gradients --rounds 3

First eight chats stream alone, then the same eight stream while twenty attributions are asked for
at once. The law to hold: no gap between two tokens of a chat is longer than twice the 95th
percentile of the unloaded gaps plus the longest single slice of attribution. Nothing else should
run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx

from trimtab.ui.local_server import LocalServer, local_server

TOPICS = (
    "a lighthouse",
    "the tides",
    "a bakery",
    "old maps",
    "beekeeping",
    "glass",
    "salt",
    "rain",
)
QUESTION = (
    "My neighbour says that it will rain tomorrow because the swallows fly low, and my sister "
    "says that it will stay dry because the moon is full. Whom should I believe, and why?"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="attnlrp")
    parser.add_argument("--attributions", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with local_server(given.model, dtype=given.dtype) as server:
        _round(server, given.tokens)  # warm
        for _ in range(given.rounds):
            alone, _, _ = _round(server, given.tokens)
            server.engine._slices.longest_s = 0.0
            beside, gone, answers = _round(
                server, given.tokens, n_attributions=given.attributions, method=given.method
            )
            slice_s = server.engine._slices.longest_s
            p95 = statistics.quantiles(alone, n=20)[-1]
            bound = 2 * p95 + slice_s
            print(
                json.dumps(
                    {
                        "unloaded_ms": {
                            "median": round(1e3 * statistics.median(alone), 1),
                            "p95": round(1e3 * p95, 1),
                            "longest": round(1e3 * max(alone), 1),
                        },
                        "loaded_ms": {
                            "median": round(1e3 * statistics.median(beside), 1),
                            "p95": round(1e3 * statistics.quantiles(beside, n=20)[-1], 1),
                            "longest": round(1e3 * max(beside), 1),
                        },
                        "longest_slice_ms": round(1e3 * slice_s, 1),
                        "bound_ms": round(1e3 * bound, 1),
                        "holds": max(beside) <= bound,
                        "attributions_done": answers,
                        "attributions_s": round(gone, 1),
                    }
                ),
                flush=True,
            )


def _round(
    server: LocalServer, n_tokens: int, *, n_attributions: int = 0, method: str = ""
) -> tuple[list[float], float, int]:
    """Return the gaps between tokens, and how long the attributions took and how many came."""
    started = threading.Barrier(len(TOPICS) + 1)
    limits = httpx.Limits(max_connections=64)
    with (
        httpx.Client(base_url=server.url, timeout=600, limits=limits) as client,
        ThreadPoolExecutor(64) as pool,
    ):
        chats = [
            pool.submit(stream, client, server.model, topic, n_tokens, started) for topic in TOPICS
        ]
        started.wait()
        began = time.perf_counter()
        asked = [
            pool.submit(_attribute, client, server.model, method, i) for i in range(n_attributions)
        ]
        gaps = [gap for chat in chats for gap in chat.result()]
        answers = sum(future.result() for future in asked)
        return gaps, time.perf_counter() - began, answers


def stream(
    client: httpx.Client,
    model: str,
    topic: str,
    n_tokens: int,
    started: threading.Barrier | None = None,
) -> list[float]:
    """Stream a chat and return the gaps between its tokens, seconds.

    Args:
        client: of the server.
        model: its model's name.
        topic: what the story is to be about.
        n_tokens: how long it gets.
        started: waited for once the chat is past its prompt.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a long story about {topic}."}],
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    times = []
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"content"' not in line:
                continue
            times.append(time.perf_counter())
            if len(times) == 4 and started is not None:
                started.wait()  # every chat is past its prompt
    # From here on: a chat's first tokens wait for the others' prompts.
    return [b - a for a, b in pairwise(times[4:])]


def _attribute(client: httpx.Client, model: str, method: str, number: int) -> int:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{QUESTION} ({number})"}],
        "preferred": "Neither of them.",
        "dispreferred": "Your sister.",
        "method": method,
    }
    answer = client.post("/v1/attributions", json=body)
    answer.raise_for_status()
    return 1


if __name__ == "__main__":
    main()

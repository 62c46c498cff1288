"""What a chat feels while the server builds a vector: the gaps between its tokens, through HTTP.

    python benchmarks/build_load.py                # SmolLM2-135M, about two minutes and a half
    python benchmarks/build_load.py --dtype float32 --seconds 240

One chat after the other streams, first alone, then beside a calibrated build of a bundled concept,
until that is done or the time is over; then it is called off. Nothing is left in the store. The
longest gap holds the build's longest slice and a step of the batch. Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import httpx
from attribution_load import TOPICS, stream

from trimtab.ui.local_server import local_server

BUILDS = "/v1/steering/builds"
ID = "build-load"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--concept", default="optimistic")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    with (
        local_server(given.model, dtype=given.dtype) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        stream(client, server.model, TOPICS[0], given.tokens)  # warm
        alone = [stream(client, server.model, topic, given.tokens) for topic in TOPICS[:3]]
        _tell("alone", [gap for gaps in alone for gap in gaps], 0.0)
        body = {"kind": "vector", "id": ID, "concept": given.concept, "overwrite": True}
        answer = client.post(BUILDS, json=body)
        answer.raise_for_status()
        path = f"{BUILDS}/{answer.json()['id']}"
        beside: dict[str, list[float]] = defaultdict(list)
        slices: dict[str, float] = defaultdict(float)
        until = time.perf_counter() + given.seconds
        number = 0
        state = answer.json()
        while state["status"] in ("queued", "running") and time.perf_counter() < until:
            server.engine._slices.longest_s = 0.0
            topic = TOPICS[number % len(TOPICS)]
            gaps = stream(client, server.model, topic, given.tokens)
            state = client.get(path).json()
            stage = state["stage"] or "starting"
            beside[stage] += gaps
            slices[stage] = max(slices[stage], server.engine._slices.longest_s)
            number += 1
        client.delete(path)
        while client.get(path).json().get("status") == "running":
            time.sleep(0.1)
        client.delete(f"/v1/steering/vectors/{ID}")
        for stage, gaps in beside.items():
            _tell(stage, gaps, slices[stage])


def _tell(stage: str, gaps: list[float], longest_slice_s: float) -> None:
    """Print gaps in milliseconds."""
    found = {
        "n": len(gaps),
        "median_ms": statistics.median(gaps),
        "p95_ms": statistics.quantiles(gaps, n=20)[-1],
        "longest_ms": max(gaps),
        "longest_slice_ms": longest_slice_s,
    }
    rounded = {k: round(1e3 * v) if k.endswith("_ms") else v for k, v in found.items()}
    print(json.dumps({"stage": stage, **rounded}), flush=True)


if __name__ == "__main__":
    main()

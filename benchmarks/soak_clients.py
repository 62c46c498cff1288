"""What the soak's clients do: store, replace and delete vectors, chat, stream, leave."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from steered_arms import TOPICS

from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.classifier import to_bytes as classifier_bytes
from trimtab.steering.vector import VectorArtifact
from trimtab.steering.vector import to_bytes as vector_bytes

MODEL = "smollm2"
LABELS = ("casual", "expert", "concise", "warm")
VECTORS = tuple(f"v{i}" for i in range(6))
TEXTS = "Write a story about {}.", "Why do people like {}? Explain.", "List ten words about {}."


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
        self._generator = torch.Generator().manual_seed(seed)

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
        body = self.body()
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
        body = self.body() | {"stream": True}
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

    def body(self) -> dict[str, Any]:
        """Return a chat request at random."""
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


def random_classifier(ref: Any, norms: list[float]) -> bytes:
    """Return a classifier of random weights at layers 0 (for gates) and in the middle."""
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

"""A server of canned answers, as the Chat tab talks to one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from trimtab.ui.client import ServerError

RECEIPT = {"applied": [], "layers": [3], "dose": {"3": 0.1}}
WORDS = ["One", " two", " three"]


class FakeServer:
    """Answers a chat in three words; each waits for `go` if there is one."""

    url = "http://127.0.0.1:1"
    key = None

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.receipt: dict[str, Any] | None = RECEIPT
        self.go: asyncio.Event | None = None
        self.closed = 0
        self.failure: str | None = None

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        self.bodies.append(body)
        try:
            for i, word in enumerate(WORDS):
                if self.go is not None and i:
                    await self.go.wait()
                if self.failure and i:
                    raise ServerError(self.failure)
                yield {
                    "choices": [
                        {
                            "delta": {"content": word},
                            "logprobs": {"content": [{"token": word, "logprob": -0.5}]},
                            "finish_reason": None,
                        }
                    ]
                }
            last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
            steered = "steering" in body and self.receipt is not None
            yield {**last, **({"steering": self.receipt} if steered else {})}
        finally:
            self.closed += 1

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        n = sum(len(m["content"].split()) for m in body["messages"])
        said = body["messages"][-1]
        words = said["content"].split(" ") if said["role"] == "assistant" else []
        parts = [words[0], *(f" {w}" for w in words[1:])] if words else []
        entries = [None, *[{"1": {"logprob": -9.0, "decoded_token": "x"}}] * 4]
        entries += [
            {"7": {"logprob": -float(i + 1), "decoded_token": p}} for i, p in enumerate(parts)
        ]
        assert body["max_tokens"] == 0
        assert "steering" not in body  # the unsteered model is asked
        assert n
        return {"prompt_logprobs": entries}

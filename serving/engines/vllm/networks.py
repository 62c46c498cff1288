"""Classifiers' networks on the workers: put there once, named by digest in every request."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from trimtab.serving.engines.vllm.plan_wire import packed_network
from trimtab.steering.plan import Reader

# Networks we know the workers to have; they keep twice as many (`worker_steering.KEPT_NETWORKS`).
_TAUGHT = 128


class Networks:
    """What the workers of one `AsyncLLM` have been taught.

    Args:
        llm: reaches them.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._taught: OrderedDict[str, asyncio.Task[None]] = OrderedDict()

    async def teach(self, readers: Mapping[str, Reader]) -> None:
        """Put networks on the workers that are not there yet."""
        for digest, reader in readers.items():
            task = self._taught.get(digest)
            if task is None or (task.done() and (task.cancelled() or task.exception())):
                task = asyncio.create_task(self._send(digest, reader))
                self._taught[digest] = task
            self._taught.move_to_end(digest)
            await asyncio.shield(task)
        while len(self._taught) > _TAUGHT:
            self._taught.popitem(last=False)

    async def _send(self, digest: str, reader: Reader) -> None:
        packed = packed_network(reader.classifier)
        await self._llm.collective_rpc("trimtab_learn", args=(digest, packed))

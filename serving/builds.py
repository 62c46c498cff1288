"""Vectors and classifiers that are being built, and the last that were."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.serving.engines.base import ModelAccess
from trimtab.serving.errors import RequestError, error_body
from trimtab.serving.jobs import Job, JobQueue, JobStatus, Work
from trimtab.steering.errors import TrimtabError

log = logging.getLogger("trimtab.serving")

MAX_ENDED = 32
"""Builds that are remembered after their end."""


@dataclass(frozen=True)
class Built:
    """What a build came to.

    Attributes:
        card: the stored artifact's, as its own route gives it.
        problem: what the artifact lacks of what was asked for; None if it lacks nothing.
    """

    card: dict[str, Any]
    problem: TrimtabError | None = None


class Build:
    """One build, from its request to the end of its memory.

    Args:
        job: its work.
        kind: `vector` or `classifier`.
        artifact: id of what is built.
    """

    def __init__(self, job: Job[Built], *, kind: str, artifact: str) -> None:
        self.id = job.id
        self.kind = kind
        self.artifact = artifact
        self.created = int(time.time())
        self._job: Job[Built] | None = job
        self._end: dict[str, Any] = {}

    @property
    def is_over(self) -> bool:
        """True once it is done, failed or cancelled."""
        return self._job is None

    def cancel(self) -> None:
        """End it at its next slice or step; nothing if it is over."""
        if self._job is not None:
            self._job.cancel()

    def end(self, job: Job[Built]) -> None:
        """Keep what came of it, and nothing that holds a tensor: not the job, nor its error."""
        outcome: dict[str, Any] = {"error": None, "result": None}
        error = job.result.exception()
        if error is None:
            built = job.result.result()
            outcome["result"] = built.card
            error = built.problem
        if error is not None and job.status is not JobStatus.CANCELLED:
            outcome["error"] = _error_object(self, error)
        self._end = {**_progress(job), "position": 0, **outcome}
        self._job = None

    def state(self, queue: JobQueue[Built]) -> dict[str, Any]:
        """Return it as it goes over the wire."""
        head = {
            "object": "steering.build",
            "id": self.id,
            "kind": self.kind,
            "artifact": self.artifact,
            "created": self.created,
        }
        if self._job is None:
            return {**head, **self._end}
        position = queue.position(self._job)
        now = {**_progress(self._job), "position": position, "error": None, "result": None}
        return {**head, **now}


class Builds:
    """The builds of one server, newest last.

    Args:
        max_queue: builds that may wait or run; more are refused with 429.
        on_end: told of each that is over: its kind and how it ended.
    """

    def __init__(
        self, *, max_queue: int, on_end: Callable[[str, JobStatus], None] | None = None
    ) -> None:
        self._queue: JobQueue[Built] = JobQueue(
            what="build",
            prefix="build",
            max_queue=max_queue,
            retry_after_s=30,
            on_end=self._ended,
        )
        self._on_end = on_end
        self._all: OrderedDict[str, Build] = OrderedDict()

    def __len__(self) -> int:
        """Return how many wait or run."""
        return len(self._queue)

    def submit(
        self, work: Work[Built], access: ModelAccess, *, kind: str, artifact: str, overwrite: bool
    ) -> Build:
        """Queue a build.

        Raises:
            OverloadedError: the queue is full.
            RequestError: 409, one that waits or runs makes an artifact of that id.
        """
        if not overwrite:
            for other in self._all.values():
                if not other.is_over and (other.kind, other.artifact) == (kind, artifact):
                    raise RequestError(
                        f"The build {other.id} makes a {kind} {artifact!r} already; wait for it, "
                        "choose another id, or send overwrite true to build it again.",
                        param="id",
                        status=409,
                        code="already_exists",
                    )
        job = self._queue.submit(work, access)
        build = self._all[job.id] = Build(job, kind=kind, artifact=artifact)
        return build

    def find(self, id: str) -> Build:
        """Return a build that waits or runs, or one of the last that ended.

        Raises:
            RequestError: 404, there is none of that id.
        """
        build = self._all.get(id)
        if build is None:
            raise RequestError(
                f"There is no build {id[:80]!r}; the last {MAX_ENDED} that ended are remembered.",
                param="id",
                status=404,
                code="not_found",
            )
        return build

    def forget(self, build: Build) -> None:
        """Remember one that is over no longer."""
        self._all.pop(build.id, None)

    def state(self, build: Build) -> dict[str, Any]:
        """Return a build as it goes over the wire."""
        return build.state(self._queue)

    def states(self) -> list[dict[str, Any]]:
        """Return all builds as they go over the wire, newest first."""
        return [self.state(build) for build in reversed(self._all.values())]

    async def close(self) -> None:
        """Cancel every build and end the thread."""
        await self._queue.close()

    def _ended(self, job: Job[Built]) -> None:
        build = self._all[job.id]
        build.end(job)
        if self._on_end is not None:
            self._on_end(build.kind, job.status)
        over = [one for one in self._all.values() if one.is_over]
        for old in over[: max(0, len(over) - MAX_ENDED)]:
            self.forget(old)


def _progress(job: Job[Built]) -> dict[str, Any]:
    return {
        "status": job.status.value,
        "stage": job.stage,
        "done": job.done,
        "total": job.total,
        "elapsed_s": round(job.elapsed_s, 2),
    }


def _error_object(build: Build, error: BaseException) -> dict[str, Any]:
    """Return an error as OpenAI's object; one that is not meant for clients is logged instead."""
    if isinstance(error, TrimtabError):
        body = error_body(error.message, status=error.status, param=error.param, code=error.code)
    else:
        log.error("%s failed: %s", build.id, error, exc_info=error)
        message = f"The server failed on this build; its log has the details under {build.id}."
        body = error_body(message, status=500, code="internal_error")
    found: dict[str, Any] = body["error"]
    return found

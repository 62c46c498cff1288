"""Attributions one after the other, on a thread beside the event loop, in a queue of their own."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from trimtab.attribution.errors import CancelledError
from trimtab.attribution.result import Attribution
from trimtab.attribution.slices import Slices
from trimtab.serving.engines.base import ModelAccess, OverloadedError

T = TypeVar("T")
Progress = Callable[[int, int], None]
Work = Callable[[Slices, Progress], Attribution]


class JobStatus(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One attribution. Everything but `cancel` belongs to the event loop.

    Attributes:
        id: its name on the wire.
        status: how far it is.
        done: rows read so far.
        total: rows in all, 0 until it runs.
        began: when it started to run, by `time.perf_counter`; None before.
    """

    def __init__(self, work: Work) -> None:
        self.id = f"attr-{uuid.uuid4().hex}"
        self.status = JobStatus.QUEUED
        self.done = 0
        self.total = 0
        self.began: float | None = None
        self.result: asyncio.Future[Attribution] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting when it fails; then the error must not be logged as forgotten.
        self.result.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.changed = asyncio.Event()
        self._work: Work | None = work
        self._cancelled = threading.Event()
        self._future: asyncio.Future[Attribution] | None = None

    @property
    def is_over(self) -> bool:
        """True once it is done, failed or cancelled."""
        return self.status not in (JobStatus.QUEUED, JobStatus.RUNNING)

    @property
    def eta_s(self) -> float | None:
        """Seconds it will still take at the pace so far; None while nothing is known."""
        if self.began is None or not self.done or not self.total:
            return None
        pace = (time.perf_counter() - self.began) / self.done
        return pace * max(0, self.total - self.done)

    def cancel(self) -> None:
        """End it at its next slice, or before it starts. Safe to call when it is over."""
        self._cancelled.set()
        if self.status is JobStatus.QUEUED and self._future is not None:
            self._future.cancel()  # it leaves the queue at once

    def run(self, access: ModelAccess, progress: Progress) -> Attribution:
        """Do the work on the calling thread.

        Raises:
            CancelledError: it was called off.
        """
        work, self._work = self._work, None
        assert work is not None
        return work(_Checked(access.slices, self._cancelled), progress)


class _Checked:
    """Slices of a job that may be called off."""

    def __init__(self, slices: Slices, cancelled: threading.Event) -> None:
        self._slices = slices
        self._cancelled = cancelled

    def __call__(self, work: Callable[[], T]) -> T:
        if self._cancelled.is_set():
            raise CancelledError("The attribution was cancelled.")
        return self._slices(work)


class AttributionJobs:
    """The queue. One job runs at a time; its slices take turns with the batch.

    Args:
        max_queue: jobs that may wait or run; more are refused with 429.
    """

    def __init__(self, *, max_queue: int) -> None:
        self.max_queue = max_queue
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._n_reserved = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trimtab-attribution")
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    def find(self, id: str) -> Job | None:
        """Return a job that waits or runs, or None."""
        return self._live.get(id)

    def position(self, job: Job) -> int:
        """Return how many jobs are before this one."""
        return list(self._live).index(job.id) if job.id in self._live else 0

    def reserve(self) -> Reservation:
        """Keep a place for a job that comes later.

        Raises:
            OverloadedError: the queue is full.
        """
        self._check_room()
        self._n_reserved += 1
        return Reservation(self)

    def submit(
        self, work: Work, access: ModelAccess, *, reservation: Reservation | None = None
    ) -> Job:
        """Queue a job.

        Raises:
            OverloadedError: the queue is full.
        """
        if reservation is not None:
            reservation.release()
        self._check_room()
        job = Job(work)
        self._live[job.id] = job
        task = asyncio.create_task(self._watch(job, access), name=job.id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def close(self) -> None:
        """Cancel every job and end the thread."""
        for job in self._live.values():
            job.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=False)

    def _check_room(self) -> None:
        n = len(self._live) + self._n_reserved
        if n >= self.max_queue:
            raise OverloadedError(
                f"{n} attributions wait or run and at most {self.max_queue} may; try again "
                "shortly.",
                retry_after_s=5,
            )

    async def _watch(self, job: Job, access: ModelAccess) -> None:
        loop = asyncio.get_running_loop()

        def note(done: int, total: int) -> None:
            job.done, job.total = done, total
            job.changed.set()

        def progress(done: int, total: int) -> None:
            with suppress(RuntimeError):  # the loop is gone, nobody listens
                loop.call_soon_threadsafe(note, done, total)

        def start() -> None:
            job.status = JobStatus.RUNNING
            job.began = time.perf_counter()
            job.changed.set()

        def run() -> Attribution:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(start)
            return job.run(access, progress)

        try:
            job._future = loop.run_in_executor(self._pool, run)
            found = await job._future
            job.status = JobStatus.DONE
            job.result.set_result(found)
        except (CancelledError, asyncio.CancelledError):
            job.status = JobStatus.CANCELLED
            job.result.set_exception(CancelledError("The attribution was cancelled."))
        except Exception as error:
            job.status = JobStatus.FAILED
            job.result.set_exception(error)
        finally:
            self._live.pop(job.id, None)
            job.changed.set()


class Reservation:
    """A place in the queue for a job that comes later. Released once, by whoever holds it."""

    def __init__(self, jobs: AttributionJobs) -> None:
        self._jobs: AttributionJobs | None = jobs

    def release(self) -> None:
        """Give the place back. Safe to call twice."""
        if self._jobs is not None:
            self._jobs._n_reserved -= 1
            self._jobs = None

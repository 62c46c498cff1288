"""Long work one job after the other, on a thread beside the event loop, in a queue of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from typing import Generic, TypeVar

from trimtab.attribution.errors import CancelledError
from trimtab.attribution.slices import Slices
from trimtab.serving.engines.base import ModelAccess, OverloadedError

R = TypeVar("R")
T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with a stage, steps done and steps in all; raises `CancelledError` in a job called off."""
Work = Callable[[Slices, Progress], R]


class JobStatus(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job(Generic[R]):
    """One piece of long work. Everything but `cancel` belongs to the event loop.

    Args:
        work: what to do, on the queue's thread.
        id: its name on the wire.
        what: what it is called in messages.

    Attributes:
        id: its name on the wire.
        status: how far it is.
        stage: what it does now; None before it has said so.
        done: steps of the stage done so far.
        total: steps of the stage in all, 0 until they are known.
        began: when it started to run, by `time.perf_counter`; None before.
        result: what the work returned, or the error it ended with.
        changed: set whenever any of these changes.
    """

    def __init__(self, work: Work[R], *, id: str, what: str) -> None:
        self.id = id
        self.status = JobStatus.QUEUED
        self.stage: str | None = None
        self.done = 0
        self.total = 0
        self.began: float | None = None
        self.result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting when it fails; then the error must not be logged as forgotten.
        self.result.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.changed = asyncio.Event()
        self._what = what
        self._work: Work[R] | None = work
        self._cancelled = threading.Event()
        self._future: Future[R] | None = None

    @property
    def is_over(self) -> bool:
        """True once it is done, failed or cancelled."""
        return self.status not in (JobStatus.QUEUED, JobStatus.RUNNING)

    @property
    def elapsed_s(self) -> float:
        """Seconds since it started to run; 0 before."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def eta_s(self) -> float | None:
        """Seconds the stage will still take at the pace so far; None while nothing is known."""
        if self.began is None or not self.done or not self.total:
            return None
        pace = self.elapsed_s / self.done
        return pace * max(0, self.total - self.done)

    def cancel(self) -> None:
        """End it at its next slice or step, or before it starts. Safe to call when it is over."""
        self._cancelled.set()
        if self._future is not None:
            self._future.cancel()  # if it still waits, it leaves the queue at once

    def run(self, access: ModelAccess, tell: Progress) -> R:
        """Do the work on the calling thread.

        Raises:
            CancelledError: it was called off.
        """
        work, self._work = self._work, None
        assert work is not None

        def progress(stage: str, done: int, total: int) -> None:
            self.check()
            tell(stage, done, total)

        return work(_Checked(access.slices, self.check), progress)

    def called_off(self) -> CancelledError:
        """Return the error that a cancelled job ends with."""
        return CancelledError(f"The {self._what} was cancelled.")

    def check(self) -> None:
        """Raise `CancelledError` if it was called off."""
        if self._cancelled.is_set():
            raise self.called_off()


class _Checked:
    """Slices of a job that may be called off."""

    def __init__(self, slices: Slices, check: Callable[[], None]) -> None:
        self._slices = slices
        self._check = check

    def __call__(self, work: Callable[[], T]) -> T:
        self._check()
        return self._slices(work)


class JobQueue(Generic[R]):
    """One job runs at a time; its slices take turns with the batch.

    Args:
        what: what a job is called, in messages and in the thread's name.
        prefix: how its ids begin.
        max_queue: jobs that may wait or run; more are refused with 429.
        retry_after_s: when to come back if they are.
        on_end: told of each job that is over, at once.
    """

    def __init__(
        self,
        *,
        what: str,
        prefix: str,
        max_queue: int,
        retry_after_s: int = 5,
        on_end: Callable[[Job[R]], None] | None = None,
    ) -> None:
        self.max_queue = max_queue
        self._what = what
        self._prefix = prefix
        self._retry_after_s = retry_after_s
        self._on_end = on_end
        self._live: OrderedDict[str, Job[R]] = OrderedDict()
        self._n_reserved = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"trimtab-{what}")
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    def find(self, id: str) -> Job[R] | None:
        """Return a job that waits or runs, or None."""
        return self._live.get(id)

    def position(self, job: Job[R]) -> int:
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
        self, work: Work[R], access: ModelAccess, *, reservation: Reservation | None = None
    ) -> Job[R]:
        """Queue a job.

        Raises:
            OverloadedError: the queue is full.
        """
        if reservation is not None:
            reservation.release()
        self._check_room()
        job = Job(work, id=f"{self._prefix}-{uuid.uuid4().hex}", what=self._what)
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
                f"{n} {self._what}s wait or run and at most {self.max_queue} may; try again "
                "shortly.",
                retry_after_s=self._retry_after_s,
            )

    async def _watch(self, job: Job[R], access: ModelAccess) -> None:
        loop = asyncio.get_running_loop()

        def note(stage: str, done: int, total: int) -> None:
            job.stage, job.done, job.total = stage, done, total
            job.changed.set()

        def tell(stage: str, done: int, total: int) -> None:
            with suppress(RuntimeError):  # the loop is gone, nobody listens
                loop.call_soon_threadsafe(note, stage, done, total)

        def start() -> None:
            job.status = JobStatus.RUNNING
            job.began = time.perf_counter()
            job.changed.set()

        def run() -> R:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(start)
            return job.run(access, tell)

        try:
            job.check()
            job._future = self._pool.submit(run)
            found = await asyncio.wrap_future(job._future)
            job.status = JobStatus.DONE
            job.result.set_result(found)
        except (CancelledError, asyncio.CancelledError):
            job.status = JobStatus.CANCELLED
            job.result.set_exception(job.called_off())
        except Exception as error:
            job.status = JobStatus.FAILED
            job.result.set_exception(error)
        finally:
            self._live.pop(job.id, None)
            job.changed.set()
            if self._on_end is not None:
                self._on_end(job)


class Reservation:
    """A place in the queue for a job that comes later. Released once, by whoever holds it."""

    def __init__(self, jobs: JobQueue[R]) -> None:
        self._jobs: JobQueue[R] | None = jobs

    def release(self) -> None:
        """Give the place back. Safe to call twice."""
        if self._jobs is not None:
            self._jobs._n_reserved -= 1
            self._jobs = None

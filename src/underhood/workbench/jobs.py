"""Jobs: everything that runs a model, one after the other, in one thread.

A request makes a job, events tell of it, and it outlives both. Events are numbered: whoever was
away asks for those after the last one seen. Of progress only the newest is kept, so that a long
sweep does not fill the memory.

A job is cancelled at the next forward pass of its model, whichever method is running: a hook that
only looks raises `Halt` there (`interruptible`). Sweeps are asked to stop besides, their own way.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from underhood.core.errors import Stopped, UnderhoodError, UsageError
from underhood.view.clean import clean

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["Event", "Halt", "Job", "QueueFull", "Worker", "interruptible", "refusal"]

State = Literal["queued", "running", "done", "failed", "cancelled"]

KEPT = 100  # jobs that are remembered after their end
WAITING = 32  # jobs that may wait at once
OFTEN = 0.1  # seconds between two notes of progress
INDENT = "\n" + " " * len("  Given:   ")

log = logging.getLogger("underhood.workbench")


class Halt(BaseException):
    """Unwinds a cancelled job. No `Exception`: nobody between here and the worker may hold it."""


class QueueFull(UnderhoodError):
    """More jobs are waiting than the server keeps."""


def refusal(error: BaseException) -> dict[str, Any]:
    """An error as the page shows it: never a traceback."""
    kind = type(error).__name__
    if isinstance(error, UnderhoodError):
        # Lines are indented for a terminal, where "Given:" stands before the first.
        given = None if error.given is None else str(error.given)[:2000].replace(INDENT, "\n")
        return {"type": kind, "what": error.what, "given": given, "why": error.why, "do": error.do}
    line = (str(error).splitlines() or [""])[0][:500]
    if kind in ("MemoryError", "OutOfMemoryError"):  # the second is torch's
        do = "use a shorter prompt, fewer prompts, or a smaller batch size"
        return {"type": kind, "what": "the memory ran out", "given": None, "why": line, "do": do}
    return {
        "type": kind,
        "what": "something went wrong that nobody foresaw",
        "given": None,
        "why": f"{kind}: {line}" if line else kind,
        "do": "the server's terminal shows where; the server goes on",
    }


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a job told: its state, its progress, or a part of its answer."""

    number: int
    kind: str
    data: dict[str, Any]


class Job:
    """One piece of work.

    Attributes:
        id: By which pages ask for it.
        title: What it does, in a few words.
        state: Where it stands.
        model: Name of the model it runs.
        result: Id of what it left on the shelf.
        error: Why it failed, see `refusal`.
        left: Whether the server is going away, so that nobody waits for news.
    """

    def __init__(self, title: str, work: Callable[["Job"], None], *, model: str = "") -> None:
        self.id = secrets.token_hex(8)
        self.title, self.model = title, model
        self.state: State = "queued"
        self.result: str | None = None
        self.error: dict[str, Any] | None = None
        self.done, self.total, self.note, self.passes = 0, 0, "", 0
        self.stop = threading.Event()
        self.left = False
        self._work: Callable[[Job], None] | None = work
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._count = 0
        self._told = 0.0
        self._readers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._state("queued")

    def public(self) -> dict[str, Any]:
        """What a page may know of it."""
        return {
            "id": self.id, "title": self.title, "model": self.model, "state": self.state,
            "done": self.done, "total": self.total, "note": self.note, "passes": self.passes,
            "result": self.result, "error": self.error,
        }  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "cancelled")

    # What work says ------------------------------------------------------------------------------

    def part(self, name: str, **data: Any) -> None:
        """Tell a part of the answer; what is no number becomes None."""
        self._tell("part", clean({"name": name, **data}))

    def progress(self, done: int, total: int, note: str | None = None) -> None:
        """Say how far it is; a note stays until the next one."""
        changed = note is not None and note != self.note
        self.done, self.total = done, total
        self.note = self.note if note is None else note
        now = time.monotonic()
        if changed or (total and done >= total) or now - self._told > OFTEN:
            self._told = now
            self._tell("state", self.public(), replaces=True)

    def check(self) -> None:
        """Count one forward pass, and stop here if somebody cancelled it.

        Raises:
            Halt: It was cancelled.
        """
        self.passes += 1
        if self.stop.is_set():
            raise Halt
        if not self.total:  # nobody knows how many there will be; that they go on is news too
            self.progress(0, 0)

    # From outside --------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask it to stop; one that waits ends here and now."""
        self.stop.set()
        with self._lock:
            waiting = self.state == "queued"
            self.state = "cancelled" if waiting else self.state
        if waiting:
            self._state("cancelled")

    def wait(self, before: int) -> None:
        """Say how many jobs are before it."""
        note = f"{before} job{'s' * (before > 1)} before it"
        if self.state == "queued" and note != self.note:
            self.progress(0, 0, note)

    def leave(self) -> None:
        """Ask it to stop, and let its readers go at once."""
        self.left = True
        self.cancel()
        self._wake()

    def run(self) -> None:
        """Do the work; every end is told, none is raised."""
        with self._lock:
            if self.state != "queued":
                return
            self.state, self.note = "running", ""
        self._state("running")
        work, self._work = self._work, None
        try:
            assert work is not None
            work(self)
        except (Halt, Stopped) as error:
            self.error = None if self.stop.is_set() else refusal(error)
            self._state("cancelled" if self.stop.is_set() else "failed")
        except UnderhoodError as error:
            self.error = refusal(error)
            self._state("failed")
        except Exception as error:
            log.exception("job %s (%s) failed", self.id, self.title)
            self.error = refusal(error)
            self._state("failed")
        else:
            self._state("done")

    async def events(self, after: int = 0) -> AsyncIterator[Event | None]:
        """Events after a number, as they come, until the job has ended; None now and then."""
        here = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._readers.add(here)
        try:
            while True:
                here[1].clear()
                with self._lock:
                    ended = self.ended
                    new = [e for e in self._events if e.number > after]
                for event in new:
                    yield event
                    after = event.number
                if ended or self.left:
                    return
                try:
                    await asyncio.wait_for(here[1].wait(), timeout=10)
                except TimeoutError:
                    yield None  # keeps the connection; one that is gone is noticed by it
        finally:
            with self._lock:
                self._readers.discard(here)

    def _state(self, state: State) -> None:
        self._tell("state", self.public() | {"state": state}, state=state)

    def _tell(
        self, kind: str, data: dict[str, Any], *, replaces: bool = False, state: State | None = None
    ) -> None:
        with self._lock:
            self.state = state or self.state
            self._count += 1
            if replaces and self._events[-1].kind == kind:
                self._events.pop()
            self._events.append(Event(self._count, kind, data))
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            readers = list(self._readers)
        for loop, flag in readers:
            with suppress(RuntimeError):  # a loop that has closed needs no news
                loop.call_soon_threadsafe(flag.set)


@contextmanager
def interruptible(model: "Model", job: Job) -> Iterator[None]:
    """Let a job be stopped at its model's next forward, and its sweeps tell how far they are."""
    from underhood.core.sweep import watched

    hook = model.module.register_forward_pre_hook(lambda *_: job.check())
    try:
        with watched(progress=job.progress, cancel=job.stop):
            yield
    finally:
        hook.remove()


class Worker:
    """The one thread that runs jobs, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._now: Job | None = None
        self._ready = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="underhood-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue.

        Raises:
            QueueFull: Too many are waiting.
        """
        with self._ready:
            waiting = sum(j.state == "queued" for j in self._queue)
            if waiting >= WAITING or self._closed:
                raise QueueFull(
                    "too much is waiting already",
                    given=f"{waiting} jobs in the queue",
                    do="wait for some to end, or cancel them",
                )
            self._jobs[job.id] = job
            self._queue.append(job)
            self._forget()
            self._places()
            self._ready.notify()
        return job

    def find(self, name: str) -> Job:
        """A job by its id.

        Raises:
            UsageError: None of this id, or it ended long ago.
        """
        job = self._jobs.get(name)
        if job is None:
            raise UsageError(
                "there is no such job",
                given=name[:80],
                why=f"it never was, or it ended more than {KEPT} jobs ago",
                do="look among the results: what a job found is kept there",
            )
        return job

    def jobs(self) -> list[Job]:
        """All that are remembered, oldest first."""
        with self._ready:
            return list(self._jobs.values())

    def leave(self) -> None:
        """Cancel what runs and waits, and let go of all who listen; returns at once."""
        with self._ready:
            self._closed = True
            left = list(self._jobs.values())
            self._ready.notify()
        for job in left:
            job.leave()

    def close(self) -> None:
        """Cancel what runs and waits, and let the thread end."""
        self.leave()
        self._thread.join(timeout=2)

    def _places(self) -> None:
        """Tell those that wait how many are before them."""
        waiting = [job for job in self._queue if not job.ended]
        running = self._now is not None and not self._now.ended
        for before, job in enumerate(waiting, int(running)):
            if before:
                job.wait(before)

    def _forget(self) -> None:
        over = len(self._jobs) - KEPT
        for job in [j for j in self._jobs.values() if j.ended][: max(over, 0)]:
            del self._jobs[job.id]

    def _loop(self) -> None:
        while True:
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if self._closed:
                    return
                self._now = self._queue.popleft()
                self._places()
            self._now.run()

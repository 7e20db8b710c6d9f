"""Jobs: order, cancelling, ends, events."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from underhood.core.errors import UsageError
from underhood.workbench.jobs import WAITING, Event, Job, QueueFull, Worker, interruptible


def wait(gate: threading.Event) -> None:
    gate.wait(10)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


async def _all(job: Job, after: int = 0) -> list[Event]:
    return [event async for event in job.events(after) if event is not None]


def heard(job: Job, after: int = 0) -> list[Event]:
    return asyncio.run(_all(job, after))


def test_jobs_run_one_by_one_in_order(worker: Worker) -> None:
    order: list[int] = []
    at_once, most = [], []

    def work(number: int) -> Callable[[Job], None]:
        def do(job: Job) -> None:
            at_once.append(number)
            most.append(len(at_once))
            order.append(number)
            at_once.remove(number)

        return do

    jobs = [worker.submit(Job(str(i), work(i))) for i in range(20)]
    for job in jobs:
        heard(job)
    assert order == list(range(20)) and max(most) == 1


def test_events_are_numbered_and_go_on(worker: Worker) -> None:
    def work(job: Job) -> None:
        for i in range(5):
            job.part("n", value=i)

    job = worker.submit(Job("counting", work))
    all_of_them = heard(job)
    numbers = [e.number for e in all_of_them]
    assert numbers == sorted(set(numbers))
    assert [e.data["value"] for e in all_of_them if e.kind == "part"] == list(range(5))
    assert all_of_them[-1].data["state"] == "done"
    later = heard(job, all_of_them[3].number)
    assert later == all_of_them[4:]


def test_of_progress_the_newest_is_kept(worker: Worker) -> None:
    def work(job: Job) -> None:
        for i in range(10_000):
            job.progress(i, 10_000)

    job = worker.submit(Job("sweeping", work))
    assert len(heard(job)) < 10
    assert len(job._events) < 10


def test_a_waiting_job_is_cancelled_without_running(worker: Worker) -> None:
    gate, ran = threading.Event(), []
    first = worker.submit(Job("long", lambda job: wait(gate)))
    second = worker.submit(Job("never", lambda job: ran.append(1)))
    second.cancel()
    assert second.state == "cancelled"
    gate.set()
    heard(first)
    heard(second)
    assert ran == [] and first.state == "done"


def test_a_running_job_is_cancelled_at_the_next_forward(worker: Worker) -> None:
    import underhood as uh

    model = uh.load("village")
    before = len(model.module._forward_pre_hooks)
    started, passes = threading.Event(), []

    def work(job: Job) -> None:
        with interruptible(model, job):
            while True:
                model.run(model.text.decode([5, 6, 7]))
                passes.append(1)
                started.set()

    job = worker.submit(Job("endless", work))
    assert started.wait(30)
    job.cancel()
    heard(job)
    assert job.state == "cancelled" and job.error is None
    assert len(model.module._forward_pre_hooks) == before
    worker.submit(after := Job("after", lambda job: None))
    heard(after)
    assert after.state == "done", "the worker goes on"


def test_a_failure_is_told_without_a_traceback(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    def ours(job: Job) -> None:
        raise UsageError("no such thing", given="x", why="y", do="z")

    def theirs(job: Job) -> None:
        raise ZeroDivisionError("secret detail\nsecond line")

    first, second = (worker.submit(Job("f", work)) for work in (ours, theirs))
    heard(first)
    heard(second)
    wanted = {"type": "UsageError", "what": "no such thing", "given": "x", "why": "y", "do": "z"}
    assert first.state == "failed" and first.error == wanted
    assert second.error is not None and second.error["type"] == "ZeroDivisionError"
    assert "second line" not in str(second.error) and "Traceback" not in str(second.error)
    assert "ZeroDivisionError" in caplog.text, "the server's own log has it all"


def test_the_queue_has_an_end(worker: Worker) -> None:
    gate = threading.Event()
    jobs = [worker.submit(Job("wait", lambda job: wait(gate))) for _ in range(WAITING)]
    with pytest.raises(QueueFull):
        for _ in range(3):
            jobs.append(worker.submit(Job("more", lambda job: None)))
    gate.set()
    for job in jobs:
        heard(job)


def test_a_reader_that_leaves_changes_nothing(worker: Worker) -> None:
    gate = threading.Event()

    def work(job: Job) -> None:
        job.part("a")
        gate.wait(10)
        job.part("b")

    job = worker.submit(Job("patient", work))

    async def leave() -> None:
        async for event in job.events():
            if event is not None and event.kind == "part":
                return

    asyncio.run(leave())
    gate.set()
    assert [e.data["name"] for e in heard(job) if e.kind == "part"] == ["a", "b"]
    assert not job._readers

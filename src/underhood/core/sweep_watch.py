"""Looking on at a sweep: progress, and stopping it between two passes.

Both reach a sweep as arguments, or from outside (`watched`), through methods that know nothing of
them. A first Ctrl-C lets the pass under way end; a second one does not.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from underhood.core.errors import FileProblem

__all__ = ["Cancel", "Cancelled", "Progress", "Watch", "current_watch", "patient", "watched"]

Progress = Callable[[int, int], None]
"""Called with the cells done and the cells in all."""
Cancel = Callable[[], bool] | Event
"""Says whether to stop: an event that somebody sets, or a function that returns True then."""


class Cancelled(Exception):
    """Somebody asked to stop."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on, and where what is done is kept."""

    progress: tuple[Progress, ...] = ()
    cancel: tuple[Cancel, ...] = ()
    folder: Path | None = None
    dry: tuple[Callable[[Any], None], ...] = ()

    def cancelled(self) -> bool:
        """Whether somebody wants it to stop."""
        return any(c.is_set() if isinstance(c, Event) else c() for c in self.cancel)

    def also(self, progress: Progress | None, cancel: Cancel | None) -> "Watch":
        """The same with one more of each."""
        return replace(
            self,
            progress=self.progress + ((progress,) if progress is not None else ()),
            cancel=self.cancel + ((cancel,) if cancel is not None else ()),
        )


_WATCH: ContextVar[Watch | None] = ContextVar("underhood_sweep_watch", default=None)


@contextmanager
def watched(
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    folder: str | Path | None = None,
    dry: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Look on at every sweep made inside the block, in this thread, also by a method.

    Args:
        progress: Called after each pass with the cells done and the cells in all, of the sweep that
            is running; a method may make several, one after the other.
        cancel: Stops the sweep that is running, and so the method, with `Stopped`.
        folder: Each sweep keeps its finished cells in a file of its own there, and finds them again
            when the same call is made again. Cells that hold Python functions are run as ever.
        dry: Called with each sweep's `Estimate`; no sweep is run, and each gives the unedited run's
            readings for every cell, so that a method goes on to its next sweep. Its result says
            nothing.
    """
    old = current_watch()
    place = Path(folder) if folder is not None else old.folder
    if folder is not None and place is not None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileProblem(
                "the folder for sweeps cannot be made", given=str(place),
                why=str(error.strerror or error), do="give another folder",
            ) from error  # fmt: skip
    dries = old.dry + ((dry,) if dry is not None else ())
    token = _WATCH.set(replace(old.also(progress, cancel), folder=place, dry=dries))
    try:
        yield
    finally:
        _WATCH.reset(token)


def current_watch() -> Watch:
    """Who looks on from outside, in this thread."""
    return _WATCH.get() or Watch()


@contextmanager
def patient() -> Iterator[Callable[[], bool]]:
    """Have a first Ctrl-C wait inside the block; what is yielded says whether there was one.

    An interrupt in the middle of installing or removing a hook would leave it behind. Where the
    caller or another thread handles interrupts, nothing is changed.

    Raises:
        KeyboardInterrupt: At a second Ctrl-C; and at the end, if nobody has acted on the first.
    """
    asked = False

    def note(_signal: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt

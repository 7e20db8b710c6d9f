"""Replacing an attribute for as long as somebody needs it.

Several sessions, in several threads, may want the same function wrapped at once. The first one in
installs the wrapper, the last one out restores exactly what was there; the wrapper itself asks the
running thread's session what to do, so nobody sees anybody else's taps.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["active_patches", "evaluating", "patched"]


@dataclass(slots=True)
class _Installed:
    owner: Any
    original: Any
    own: bool
    users: int = 1


_LOCK = threading.Lock()
_INSTALLED: dict[tuple[int, str], _Installed] = {}


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Have `owner.name` replaced by `wrap(original)` inside the block.

    `wrap` must give the same wrapper whoever asks, since only the first asker's is installed.
    """
    key = (id(owner), name)
    with _LOCK:
        if key in _INSTALLED:
            _INSTALLED[key].users += 1
        else:
            original = getattr(owner, name)
            _INSTALLED[key] = _Installed(
                owner, vars(owner).get(name, original), name in vars(owner)
            )
            setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        with _LOCK:
            entry = _INSTALLED[key]
            entry.users -= 1
            if not entry.users:
                del _INSTALLED[key]
                if entry.own:
                    setattr(owner, name, entry.original)
                else:
                    delattr(owner, name)


@dataclass(slots=True)
class _Quiet:
    training: list[nn.Module]
    users: int = 0


_QUIET: dict[int, _Quiet] = {}


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; each module's own flag is put back by the last one out."""
    with _LOCK:
        if id(root) not in _QUIET:
            training = [m for m in root.modules() if m.training]
            for module in training:
                module.training = False
            _QUIET[id(root)] = _Quiet(training)
        _QUIET[id(root)].users += 1
    try:
        yield
    finally:
        with _LOCK:
            entry = _QUIET[id(root)]
            entry.users -= 1
            if not entry.users:
                del _QUIET[id(root)]
                for module in entry.training:
                    module.training = True


def active_patches() -> int:
    """Number of attributes that are replaced right now (0 outside all sessions)."""
    return len(_INSTALLED)

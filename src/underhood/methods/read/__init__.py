"""read: what is there."""

from typing import Any

from underhood.methods.registry import gather

gather("read", globals())


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no method {name!r} in underhood.read")

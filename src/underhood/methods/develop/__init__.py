"""develop: how it came to be."""

from typing import Any

from underhood.methods.registry import gather

gather("develop", globals())


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no method {name!r} in underhood.develop")

"""decompose: what it is made of."""

from typing import Any

from underhood.methods.registry import gather

gather("decompose", globals())


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no method {name!r} in underhood.decompose")

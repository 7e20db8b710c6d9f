"""compare: two models, one question."""

from typing import Any

from underhood.methods.registry import gather

gather("compare", globals())


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no method {name!r} in underhood.compare")
